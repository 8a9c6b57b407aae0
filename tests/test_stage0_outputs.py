"""Thumbnails, overlays, GeoJSON and the contact sheet of a stage-0 run."""

import errno
import json
import os
import re
import time
from html.parser import HTMLParser
from urllib.parse import unquote

import cv2
import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from stage0_tiling import tile
from stage0_tiling.contact_sheet import contact_sheet, write_contact_sheet
from stage0_tiling.geojson import tissue_polygons, write_tiles_geojson, write_tissue_geojson
from stage0_tiling.overlay import OUTLINE, draw_legend, draw_overlay, round_length, write_overlay, write_thumbnail
from stage0_tiling.plan import TilePlan, TilingSettings, plan_tiles
from stage0_tiling.run_table import RunFolder
from stage0_tiling.slide import PixelSize, Slide
from stage0_tiling.slide_list import SlideEntry
from stage0_tiling.tissue import Grid, TissueMask
from tests.slides import DrawnSlide

TILING = ("--tile_size", "64", "--mpp", "1.0", "--num_workers", "2")
HOSTILE = """<script>alert(1)</script> & "q" 'a' #5%20?.é"""


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """A good slide, one with a hostile name, a blank and a broken one."""
    folder = tmp_path_factory.mktemp("slides with spaces")
    hostile = folder / (HOSTILE.replace("/", "\N{DIVISION SLASH}") + ".tiff")
    DrawnSlide(width=1024, height=768, num_levels=2).write(folder / "good.tiff")
    DrawnSlide(width=640, height=1024, num_levels=2, seed=1).write(hostile)
    DrawnSlide(width=1024, height=768, num_levels=2, pieces=()).write(folder / "blank.tiff")
    (folder / "broken.svs").write_bytes(b"not a slide")
    return folder


@pytest.fixture(scope="module")
def tiled(slides, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    assert run_tile(slides, folder, "--geojson_tiles") == 1
    return RunFolder(folder)


def run_tile(slides, folder, *more):
    return tile.main(["--slides", str(slides), "--output_dir", str(folder), *TILING, *more])


def hostile_id(slides):
    return next(path.stem for path in slides.iterdir() if "script" in path.name)


# GeoJSON


def blobs(height=300, width=420, sigma=9, seed=0):
    """A mask with pieces, holes, and pieces within holes."""
    noise = np.random.default_rng(seed).normal(size=(height, width)).astype(np.float32)
    return cv2.GaussianBlur(noise, (0, 0), sigma) > -0.006


def as_tissue(mask, scale_x=1 / 16, scale_y=1 / 16):
    return TissueMask(mask, np.zeros((*mask.shape, 3), np.uint8), scale_x, scale_y)


def rasterised(features, shape, scale_x, scale_y):
    """Mask pixels whose centre lies in one of the features."""
    centres = np.stack(np.meshgrid(np.arange(shape[1]) + 0.5, np.arange(shape[0]) + 0.5), -1) / [scale_x, scale_y]
    union = shapely.union_all([shapely.geometry.shape(feature["geometry"]) for feature in features])
    return shapely.contains_xy(union, centres[..., 0], centres[..., 1])


def overlap(one, other):
    return (one & other).sum() / (one | other).sum()


@pytest.mark.parametrize(("scale_x", "scale_y"), [(1 / 16, 1 / 16), (1 / 15.98, 1 / 31.7), (1.0, 1.0)])
def test_tissue_read_back_is_the_mask(tmp_path, scale_x, scale_y):
    mask = blobs()
    write_tissue_geojson(tmp_path / "a.geojson", as_tissue(mask, scale_x, scale_y))
    collection = json.loads((tmp_path / "a.geojson").read_text())
    assert collection["type"] == "FeatureCollection" and list(tmp_path.iterdir()) == [tmp_path / "a.geojson"]
    assert overlap(rasterised(collection["features"], mask.shape, scale_x, scale_y), mask) >= 0.98
    assert len(collection["features"]) == cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)[0] - 1
    holes = 0
    for number, feature in enumerate(collection["features"], 1):
        assert feature["type"] == "Feature" and feature["geometry"]["type"] == "Polygon"
        assert feature["properties"] == {
            "objectType": "annotation",
            "classification": {"name": "Tissue", "color": [0, 160, 0]},
            "name": f"Tissue {number}",
        }
        assert shapely.geometry.shape(feature["geometry"]).is_valid
        for ring in feature["geometry"]["coordinates"]:
            assert ring[0] == ring[-1] and len(ring) >= 4
        holes += len(feature["geometry"]["coordinates"]) - 1
    assert holes > 0


def test_simplified_outlines_stay_within_a_mask_pixel():
    tissue = as_tissue(blobs(sigma=14))
    polygons = tissue_polygons(tissue)
    plain = [shapely.Polygon(exterior, holes) for exterior, holes in tissue.contours_level0()]
    assert sum(shapely.get_num_coordinates(polygons)) < 0.6 * sum(shapely.get_num_coordinates(plain))
    for simple, exact in zip(polygons, plain, strict=True):
        assert shapely.hausdorff_distance(simple.boundary, exact.boundary, densify=0.01) <= 16


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 24), st.integers(1, 24), st.floats(0, 1), st.integers(0, 10_000), st.floats(0.02, 1.0))
def test_outlines_of_any_mask_are_valid(height, width, share, seed, scale):
    mask = np.random.default_rng(seed).random((height, width)) < share
    polygons = tissue_polygons(as_tissue(mask, scale, scale))
    assert all(polygon.is_valid and not polygon.is_empty for polygon in polygons)
    assert bool(len(polygons)) == mask.any()


def test_tiles_and_origin(tmp_path):
    coords = np.array([[100, 40], [228, 40]])
    write_tiles_geojson(tmp_path / "t.geojson", coords, Grid(128, 130, 128, 130), origin=(100, 20))
    features = json.loads((tmp_path / "t.geojson").read_text())["features"]
    assert [shapely.geometry.shape(feature["geometry"]).bounds for feature in features] == [
        (0, 20, 128, 150),
        (128, 20, 256, 150),
    ]
    assert {feature["properties"]["objectType"] for feature in features} == {"tile"}
    mask = np.zeros((20, 20), bool)
    mask[5:9, 4:12] = True
    write_tissue_geojson(tmp_path / "s.geojson", as_tissue(mask), origin=(10, 20))
    [feature] = json.loads((tmp_path / "s.geojson").read_text())["features"]
    assert shapely.geometry.shape(feature["geometry"]).bounds == (54, 60, 182, 124)


def test_a_slide_is_written_as_geojson_in_its_level0_pixels(slides, tiled):
    with Slide(slides / "good.tiff") as slide:
        plan = plan_tiles(slide, TilingSettings(64, 1.0))
    tissue = plan.tissue
    features = json.loads(tiled.path("geojson", "good").read_text())["features"]
    assert overlap(rasterised(features, tissue.mask.shape, tissue.scale_x, tissue.scale_y), tissue.mask) >= 0.98
    tiles = json.loads(tiled.path("geojson_tiles", "good").read_text())["features"]
    assert [shapely.geometry.shape(feature["geometry"]).bounds[:2] for feature in tiles] == [
        tuple(corner) for corner in plan.coords.tolist()
    ]
    assert json.loads(tiled.path("geojson", "blank").read_text())["features"] == []
    assert not tiled.path("geojson_tiles", "blank").exists()


# Pictures


def test_pictures_are_plain_jpegs_of_the_slide(slides, tiled):
    for kind in ("thumbnails", "overlays"):
        for name in ("good", "blank", hostile_id(slides)):
            data = tiled.path(kind, name).read_bytes()
            assert data[:2] == b"\xff\xd8"
            for marker in (b"Exif", b"ICC_PROFILE", b"http://ns.adobe.com"):
                assert marker not in data
    with Image.open(tiled.path("thumbnails", "good")) as thumbnail, Slide(slides / "good.tiff") as slide:
        assert max(thumbnail.size) <= 1024 and thumbnail.size[0] / thumbnail.size[1] == pytest.approx(4 / 3, abs=0.01)
        expected = slide.read_whole(*thumbnail.size).astype(int)
        assert np.abs(np.asarray(thumbnail).astype(int) - expected).mean() < 6
    with Image.open(tiled.path("overlays", "good")) as overlay:
        assert 1024 <= max(overlay.size) <= 2048 and overlay.size[1] > 0.75 * overlay.size[0], "with a legend"


def test_what_is_not_tiled_is_faded_and_the_rest_keeps_its_colors():
    mask = np.zeros((600, 800), bool)
    mask[210:290, 310:390] = True
    picture = np.full((600, 800, 3), (200, 120, 160), np.uint8)
    grid = Grid(100, 100, 100, 100)
    plan = TilePlan(np.array([[300, 200]]), grid, TissueMask(mask, picture, 1.0, 1.0), PixelSize(0.5, 0.5, "slide"))
    overlay = draw_overlay(plan)
    assert overlay.shape == (768, 1024, 3)
    scale = 1.28
    pixel = {
        name: overlay[round(y * scale), round(x * scale)].tolist()
        for name, (x, y) in {
            "tissue": (350, 250),
            "outside": (100, 100),
            "edge": (300, 205),
            "outline": (350, 210),
        }.items()
    }
    assert pixel["tissue"] == [200, 120, 160]
    assert pixel["outside"] == pytest.approx([228, 188, 208], abs=1)
    assert pixel["edge"] == [30, 80, 220] and pixel["outline"] == [0, 160, 0]
    np.testing.assert_array_equal(
        picture, np.full_like(picture, (200, 120, 160)), "the plan's own picture is left alone"
    )


@pytest.mark.parametrize("shape", [(1, 1), (5000, 1), (1, 5000), (4000, 3), (3, 4000), (900, 12)])
def test_pictures_of_a_slide_of_any_shape(tmp_path, shape):
    tissue = TissueMask(np.ones(shape, bool), np.full((*shape, 3), 200, np.uint8), 0.0625, 0.0625)
    plan = TilePlan(np.zeros((1, 2), np.int64), Grid(256, 256, 256, 256), tissue, PixelSize(0.5, 0.5, "slide"))
    for write in (write_overlay, write_thumbnail):
        write(tmp_path / "x.jpg", plan)
        assert max(Image.open(tmp_path / "x.jpg").size) >= min(max(shape), 1024)


def test_the_scale_bar_is_as_long_as_it_says():
    picture = np.full((500, 1000, 3), 255, np.uint8)
    tissue = TissueMask(np.zeros((500, 1000), bool), picture, 1 / 16, 1 / 16)
    plan = TilePlan(np.empty((0, 2), int), Grid(256, 256, 256, 256), tissue, PixelSize(0.5, 0.5, "slide"))
    legend = draw_legend(plan, 1000, 40)  # 8 um a pixel, so that a fifth of the width is 1.6 mm
    assert legend.shape == (40, 1000, 3)
    dark = legend[20].sum(axis=1) < 300
    assert np.argmin(dark[np.argmax(dark) :]) == pytest.approx(1000 / 8, abs=2)
    unknown = draw_legend(TilePlan(plan.coords, plan.grid, tissue, None), 1000, 40)
    first = np.argmax((unknown[20] < 255).any(axis=1))
    assert tuple(unknown[20, first]) == OUTLINE, "the legend begins with the tissue, without a bar"


@given(st.floats(0.01, 1e6))
def test_round_length(longest):
    length = round_length(longest)
    assert length <= longest < 2.51 * length
    assert f"{length:e}"[0] in "125" and set(f"{length:e}"[1:].partition("e")[0]) <= {".", "0"}


# Contact sheet


class Sheet(HTMLParser):
    """What a browser makes of a sheet."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def row(slide_id, status="done", **more):
    empty = dict.fromkeys(("format", "width", "height", "mpp", "mpp_source", "tissue_fraction", "n_tiles", "seconds"))
    return (
        {"slide_id": slide_id, "path": f"/data/secret place/{slide_id}.svs", "status": status, "error": None}
        | empty
        | more
    )


def test_a_card_for_each_slide_failures_first(slides, tiled):
    page = (tiled.folder / "index.html").read_text()
    sheet = Sheet(page)
    cards = sheet.all("article")
    assert [card["data-status"] for card in cards] == ["failed", "empty", "done", "done"]
    assert {card["data-name"] for card in cards} == {"good", "blank", "broken", hostile_id(slides)}
    assert "broken.svs is no slide or image that OpenSlide or Pillow can open" in page
    good = next(card for card in cards if card["data-name"] == "good")
    assert int(good["data-tiles"]) > 10 and 0 < float(good["data-tissue"]) < 1 and float(good["data-seconds"]) > 0
    assert good["data-pixels"] == str(1024 * 768)
    assert {"generic-tiff", "1,024 x 768", "0.5 (slide)"} <= set(sheet.text)


def test_pictures_are_found_beside_the_sheet_and_nowhere_else(slides, tiled):
    page = (tiled.folder / "index.html").read_text()
    sheet = Sheet(page)
    images = sheet.all("img")
    assert len(images) == 6 and all(image["loading"] == "lazy" for image in images)
    links = [image["src"] for image in images] + [link["href"] for link in sheet.all("a")]
    for link in links:
        assert re.match(r"(thumbnails|overlays)/", link)
        assert (tiled.folder / unquote(link)).is_file()
    assert not sheet.all("link") and all("src" not in script for script in sheet.all("script"))
    assert not re.search(r"https?:|//[a-z]|url\(|@import", page)
    assert str(slides.parent) not in page and str(tiled.folder.parent) not in page


def test_hostile_names_and_errors_stay_text(tmp_path):
    hostile = HOSTILE.replace("/", "")
    for kind in ("thumbnails", "overlays"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / f"{hostile}.jpg").touch()
    rows = [
        row(hostile, width=4, height=2, n_tiles=0, tissue_fraction=0.0, format="<b>x</b>"),
        row("$title ${cards}", "failed", error='<img src=x onerror="alert(1)">'),
    ]
    sheet = Sheet(contact_sheet(tmp_path, rows))
    assert len(sheet.all("script")) == 1 and len(sheet.all("article")) == 2 and not sheet.all("b")
    assert {image["src"].partition("/")[0] for image in sheet.all("img")} == {"thumbnails", "overlays"}
    assert all("onerror" not in attributes for _, attributes in sheet.tags)
    assert {hostile, "<b>x</b>", "$title ${cards}", '<img src=x onerror="alert(1)">'} <= set(sheet.text)


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        ("/data/secret place/s.svs cannot be read", "s.svs cannot be read"),
        ("[Errno 28] No space left on device: '/mnt/run 1/x/.s.h5.7.partial'", None),
        ("[Errno 2] No such file: '/mnt/run/features/s.h5'", "[Errno 2] No such file: 's.h5'"),
        ("C:\\Users\\me\\s.svs is torn", "s.svs is torn"),
        ("tile at 3/4 of level 1/2 is torn", "tile at 3/4 of level 1/2 is torn"),
    ],
)
def test_errors_are_shown_without_folders(tmp_path, error, shown):
    text = Sheet(contact_sheet(tmp_path, [row("s", "failed", error=error)])).text
    if shown:
        assert shown in text
    assert not any("secret" in part or "/mnt" in part or "Users" in part for part in text)


def test_the_summary_counts(tmp_path):
    rows = [row(f"s{i}", n_tiles=1000, seconds=2.0, tissue_fraction=0.1 * i) for i in range(1, 4)]
    rows += [row("bad", "failed", error="torn", seconds=9.0), row("none", "empty", n_tiles=0, seconds=5.0)]
    page = contact_sheet(tmp_path, rows)
    figures = dict(re.findall(r"<dt>([^<]*)</dt><dd>([^<]*)</dd></div>", page))
    assert figures == {
        "slides": "5",
        "failed": "1",
        "empty": "1",
        "done": "3",
        "tiles": "3,000",
        "median tissue": "20.0 %",
        "tiles/s per worker": "500",
    }


def test_a_sheet_of_ten_thousand_slides_stays_light(tmp_path):
    (tmp_path / "thumbnails").mkdir()
    for i in range(0, 10_000, 1000):
        (tmp_path / "thumbnails" / f"slide_{i:05}.jpg").touch()
    rows = [row(f"slide_{i:05}", width=9, height=9, n_tiles=5, seconds=1.0) for i in range(10_000)]
    write_contact_sheet(tmp_path, rows)
    assert (tmp_path / "index.html").stat().st_size < 12e6
    assert len(Sheet((tmp_path / "index.html").read_text()).all("img")) == 10


def test_an_equal_sheet_is_left_alone(tmp_path):
    write_contact_sheet(tmp_path, [row("a")])
    os.utime(tmp_path / "index.html", (1, 1))
    write_contact_sheet(tmp_path, [row("a")])
    assert (tmp_path / "index.html").stat().st_mtime == 1
    write_contact_sheet(tmp_path, [row("a", "failed", error="torn")])
    assert (tmp_path / "index.html").stat().st_mtime > 1


# All of them in a run


def test_a_rerun_makes_nothing_again_and_overwrite_everything(slides, tmp_path):
    good = slides / "good.tiff"
    assert run_tile(good, tmp_path) == 0
    folder = RunFolder(tmp_path)
    kinds = ("coords", "overlays", "thumbnails", "geojson")
    made = {kind: folder.path(kind, "good").stat().st_mtime_ns for kind in kinds}
    assert run_tile(good, tmp_path, "--geojson_tiles") == 0
    assert made == {kind: folder.path(kind, "good").stat().st_mtime_ns for kind in kinds}
    squares = folder.path("geojson_tiles", "good")
    assert len(json.loads(squares.read_text())["features"]) == folder.read_state("good").row.n_tiles > 10
    before = squares.stat().st_mtime_ns
    assert run_tile(good, tmp_path, "--geojson_tiles") == 0
    assert squares.stat().st_mtime_ns == before
    assert run_tile(good, tmp_path, "--overwrite") == 0
    assert not squares.exists() and all(folder.path(kind, "good").stat().st_mtime_ns > made[kind] for kind in kinds)


def test_squares_of_other_tiles_do_not_stay(slides, tmp_path):
    """A slide whose file has changed is tiled again, and its squares are made again where they are asked for."""
    slide, out = tmp_path / "s.tiff", tmp_path / "out"
    slide.write_bytes((slides / "good.tiff").read_bytes())
    assert run_tile(slide, out, "--geojson_tiles") == 0
    squares = RunFolder(out).path("geojson_tiles", "s")
    DrawnSlide(width=384, height=256, num_levels=1).write(slide)
    assert run_tile(slide, out) == 0 and not squares.exists()
    assert run_tile(slide, out, "--geojson_tiles") == 0
    assert len(json.loads(squares.read_text())["features"]) == RunFolder(out).read_state("s").row.n_tiles


def test_tiles_of_a_slide_that_is_gone_fail_alone(slides, tmp_path):
    gone, good = tmp_path / "gone.tiff", tmp_path / "good.tiff"
    for path in (gone, good):
        path.write_bytes((slides / "good.tiff").read_bytes())
    (tmp_path / "list.csv").write_text("path\ngone.tiff\ngood.tiff\n")
    out = tmp_path / "out"
    assert run_tile(tmp_path / "list.csv", out) == 0
    gone.unlink()
    assert run_tile(tmp_path / "list.csv", out, "--geojson_tiles") == 1
    folder = RunFolder(out)
    assert folder.path("geojson_tiles", "good").is_file() and not folder.path("geojson_tiles", "gone").exists()
    assert folder.read_state("gone").row.status == "failed"


def test_a_disk_that_fills_up_with_tile_squares_is_no_success(slides, tmp_path, monkeypatch):
    good = slides / "good.tiff"
    assert run_tile(good, tmp_path) == 0

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tile, "write_tile_squares", full)
    monkeypatch.setattr(RunFolder, "write_state", full)
    assert run_tile(good, tmp_path, "--geojson_tiles") == 1
    assert RunFolder(tmp_path).read_state("good").row.status == "done"


def test_leftovers_of_killed_runs_are_removed(tmp_path):
    folder = RunFolder(tmp_path)
    entry = SlideEntry("s", tmp_path / "s.tiff")
    old = [tmp_path / ".index.html.7.partial", tmp_path / ".slides.csv.7.partial"]
    old += [tmp_path / "geojson" / ".s.geojson.7.partial", tmp_path / "thumbnails" / ".s.jpg.7.partial"]
    others = [tmp_path / "geojson" / ".t.geojson.7.partial", tmp_path / ".index.html.8.partial"]
    for path in (*old, *others):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    for path in old[:2]:
        os.utime(path, (time.time() - 7200,) * 2)
    folder.remove_leftovers(entry)
    folder.write_table()
    assert not any(path.exists() for path in old) and all(path.exists() for path in others)
