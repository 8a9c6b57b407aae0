"""Thumbnails, overlays and GeoJSON of a stage-0 run."""

import json

import cv2
import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from stage0_tiling import tile
from stage0_tiling.geojson import tissue_polygons, write_tiles_geojson, write_tissue_geojson
from stage0_tiling.overlay import OUTLINE, draw_legend, draw_overlay, round_length
from stage0_tiling.plan import TilePlan, TilingSettings, plan_tiles
from stage0_tiling.run_table import RunFolder
from stage0_tiling.slide import PixelSize, Slide
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
