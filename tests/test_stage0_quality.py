"""Artefacts: found where they are drawn, recorded for each tile, and kept out on request."""

import csv
import json
from dataclasses import asdict

import cv2
import h5py
import numpy as np
import pytest

from demo.reports import CASES
from demo.textures import draw_stain, render
from slide_features import read_slide_coords, read_slide_features, write_slide_coords
from stage0_tiling import encode as stage0_encode
from stage0_tiling import tile as stage0_tile
from stage0_tiling.artefacts import ARTEFACTS, blur_fractions, find_on_thumbnail, is_blurred, tile_fractions
from stage0_tiling.plan import TilingSettings, measure_quality, plan_tiles, why_empty
from stage0_tiling.slide import Slide
from stage0_tiling.tissue import Grid, TissueMask
from stage0_tiling.tissue_methods import tissue_mask
from tests.conftest import make_encoder, run_command
from tests.slides import INKS, DrawnSlide, write_pyramid

MPP = 8.0


@pytest.fixture(scope="module")
def clean():
    """A thumbnail of 4 x 3 mm at 8 um/px, and the exact mask of its tissue."""
    picture, mask = DrawnSlide(width=2048, height=1536, mpp=2.0).draw()
    size = 512, 384
    exact = cv2.resize(mask.view(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA), exact


def found_on(picture):
    return find_on_thumbnail(TissueMask(tissue_mask(picture, MPP), picture, 1 / 16, 1 / 16), MPP)


def stroke(shape, start, end, width):
    where = np.zeros(shape, np.uint8)
    cv2.line(where, start, end, 1, width)
    return where > 0


def share(part, whole):
    return (part & whole).sum() / whole.sum()


def test_a_clean_slide_has_no_artefact(clean):
    assert {name: int(mask.sum()) for name, mask in found_on(clean[0]).items()} == {"pen": 0, "fold": 0, "edge": 0}


@pytest.mark.parametrize("ink", INKS)
def test_pen_over_tissue_is_found(clean, ink):
    picture, where = clean[0].copy(), stroke(clean[1].shape, (60, 250), (260, 90), 16)
    picture[where] = INKS[ink]
    pen = found_on(picture)["pen"]
    assert share(pen, where) > 0.98
    beyond = cv2.dilate(where.view(np.uint8), np.ones((19, 19), np.uint8)) > 0  # the fringe of 50 um
    assert not (pen & ~beyond).any()


def test_a_fold_is_found_and_little_else(clean):
    picture, tissue = clean[0].astype(np.float32), clean[1]
    where = stroke(tissue.shape, (170, 0), (120, 383), 9) & tissue
    picture[where] = 245 * (picture[where] / 245) ** 2  # twice the tissue, twice the optical density
    fold = found_on(picture.astype(np.uint8))["fold"]
    assert share(fold, where) > 0.6 and share(where, fold) > 0.7


def test_bands_along_the_border_and_coverslip_edges_are_found_and_black_ink_is_no_edge(clean):
    picture = clean[0].copy()
    picture[:, :20] = 10
    line = stroke(picture.shape[:2], (480, 0), (470, 383), 3)
    picture[line] = 200
    ink = stroke(picture.shape[:2], (200, 330), (300, 350), 12)
    picture[ink] = INKS["black"]
    found = found_on(picture)
    assert found["edge"][:, :20].all() and share(found["edge"], line) > 0.8
    assert not (found["edge"] & ink).any() and share(found["pen"], ink) > 0.95 and not found["pen"][:, :20].any()


def test_small_slides_are_judged_like_large_ones(clean):
    where = stroke(clean[1].shape, (60, 250), (260, 90), 16)
    picture = clean[0].copy()
    picture[where] = INKS["blue"]
    enlarged = cv2.resize(picture, None, fx=3, fy=3, interpolation=cv2.INTER_CUBIC)
    tissue = TissueMask(tissue_mask(enlarged, MPP / 3), enlarged, 1, 1)
    pen = find_on_thumbnail(tissue, MPP / 3)["pen"]
    assert pen.shape == enlarged.shape[:2]
    shrunk = cv2.resize(pen.view(np.uint8), where.shape[::-1], interpolation=cv2.INTER_NEAREST) > 0
    assert share(found_on(picture)["pen"], shrunk) > 0.9 and share(shrunk, where) > 0.98


def textured(height, width):
    """Stained tissue at 0.5 um/px with nuclei and fibres, (height, width, 3) uint8."""
    rng = np.random.default_rng(3)
    density = render(CASES[0].tissue, height, width, draw_stain(rng), rng)
    return (245 * np.exp(-1.15 * density)).astype(np.uint8)


@pytest.mark.parametrize("contrast", [1.0, 0.4])
def test_blur_is_told_from_faint_contrast(contrast):
    picture = cv2.cvtColor(textured(512, 512), cv2.COLOR_RGB2GRAY)
    grey = 220 + contrast * (cv2.resize(picture, (256, 256), interpolation=cv2.INTER_AREA).astype(np.float32) - 220)
    assert is_blurred(grey.astype(np.uint8), 32).mean() < 0.05
    assert is_blurred(cv2.GaussianBlur(grey, (0, 0), 3.0).astype(np.uint8), 32).mean() > (
        0.95 if contrast == 1 else 0.7
    )
    assert not is_blurred(np.full((256, 256), 240, np.uint8), 32).any(), "nothing to see is not out of focus"


@pytest.fixture(scope="module")
def half_blurred(tmp_path_factory):
    """A slide whose left half of glass and tissue is sharp and has a pen stroke, and whose right half is not."""
    path = tmp_path_factory.mktemp("slides") / "half.tiff"
    picture = np.full((1024, 1536, 3), 243, np.uint8)
    picture[100:950, 100:1450] = textured(850, 1350)
    picture[:, 768:] = cv2.GaussianBlur(picture[:, 768:], (0, 0), 7)
    cv2.line(picture, (200, 500), (560, 560), INKS["green"], 90)
    write_pyramid(path, picture, 0.5)
    return path


def test_filters_drop_tiles_and_record_the_rest(half_blurred):
    with Slide(half_blurred) as slide:
        every = plan_tiles(slide, TilingSettings(tile_size=128))
        quality = measure_quality(slide, every, blur=True)
        assert set(quality) == {"tissue", *ARTEFACTS} and every.quality == {} == every.dropped
        assert all(len(values) == len(every.coords) and values.dtype == np.float32 for values in quality.values())
        right = every.coords[:, 0] >= 768
        assert quality["blur"][right].mean() > 0.8 and quality["blur"][~right].mean() < 0.1
        sharp = plan_tiles(slide, TilingSettings(tile_size=128, max_blur=0.5, max_pen=0.2))
        kept = (quality["blur"] <= 0.5) & (quality["pen"] <= 0.2)
        np.testing.assert_array_equal(sharp.coords, every.coords[kept])
        again = measure_quality(slide, sharp)
        for name in ("tissue", *ARTEFACTS):
            np.testing.assert_allclose(again[name], quality[name][kept], atol=1e-6)
        assert sharp.dropped["pen"] == (quality["pen"] > 0.2).sum() and sum(sharp.dropped.values()) == (~kept).sum()


def test_blur_reads_any_size_of_tile(half_blurred):
    with Slide(half_blurred) as slide:
        coords = np.array([[0, 0], [512, 256], [1500, 1000]])
        for side in (16, 100, 700):
            found = blur_fractions(slide, coords, Grid(side, side, side, side), slide.pixel_size())
            assert found.shape == (3,) and ((found >= 0) & (found <= 1)).all()


def test_fractions_of_tiles_are_those_of_the_mask():
    mask = np.zeros((16, 16), bool)
    mask[:8, :4] = True
    tissue = TissueMask(mask, np.zeros((16, 16, 3), np.uint8), 16 / 512, 16 / 512)
    coords = np.array([[0, 0], [256, 0], [384, 384]])
    fractions = tile_fractions(mask, tissue, coords, Grid(256, 256, 256, 256))
    assert fractions.tolist() == [0.5, 0, 0]
    assert tile_fractions(~mask, tissue, coords, Grid(256, 256, 256, 256)).tolist() == [0.5, 1, 0.25], "beyond is none"


@pytest.fixture(scope="module")
def all_blurred(tmp_path_factory):
    path = tmp_path_factory.mktemp("slides") / "blurred.tiff"
    write_pyramid(path, cv2.GaussianBlur(textured(512, 768), (0, 0), 7), 0.5)
    return path


def test_why_a_slide_is_empty_is_told(all_blurred, tmp_path):
    with Slide(all_blurred) as slide:
        settings = TilingSettings(max_blur=0.3, max_pen=0.9)
        plan = plan_tiles(slide, settings)
        assert len(plan.coords) == 0 and plan.dropped == {"blur": 6}
        assert why_empty(plan, settings) == (
            "all 6 tiles on tissue were dropped, 100% of them by --max_blur 0.3: raise it"
        )
        huge = TilingSettings(tile_size=2048, min_tissue=0.9)
        assert "lower --min_tissue" in why_empty(plan_tiles(slide, huge), huge)
    DrawnSlide(width=512, height=512, pieces=()).write(tmp_path / "blank.tiff")
    with Slide(tmp_path / "blank.tiff") as slide:
        assert "try --tissue_method entropy" in why_empty(plan_tiles(slide, TilingSettings()), TilingSettings())


def test_the_command_records_quality_and_says_what_a_filter_did(half_blurred, tmp_path):
    common = ("stage0_tiling/tile.py", "--slides", half_blurred, "--tile_size", 128, "--output_dir")
    run_command(*common, tmp_path / "all")
    recorded = read_slide_coords(tmp_path / "all" / "coords" / "half.h5")
    assert set(recorded.quality) == {"tissue", "pen", "fold", "edge"} and recorded.quality["pen"].max() > 0.3
    assert (recorded.quality["tissue"] >= 0.1 - 1e-6).all()
    done = run_command(*common, tmp_path / "few", "--max_pen", 0.1, "--quality")
    fewer = read_slide_coords(tmp_path / "few" / "coords" / "half.h5")
    assert len(fewer.coords) == (recorded.quality["pen"] <= 0.1).sum() < len(recorded.coords)
    assert fewer.quality["blur"].max() > 0.9 and "dropped: pen" in done.stderr
    with h5py.File(tmp_path / "few" / "coords" / "half.h5") as file:
        assert all(file[name].dtype == np.float32 for name in ("tissue", *ARTEFACTS))


def test_a_filter_that_drops_all_tiles_is_named(all_blurred, tmp_path, caplog):
    arguments = ["--slides", str(all_blurred), "--output_dir", str(tmp_path), "--max_blur", "0.3"]
    assert stage0_tile.main(arguments) == 0
    assert "blurred: all 6 tiles on tissue were dropped, 100% of them by --max_blur 0.3: raise it" in caplog.text
    with (tmp_path / "slides.csv").open() as file:
        [row] = csv.DictReader(file)
    assert (row["status"], row["n_tiles"]) == ("empty", "0") and float(row["tissue_fraction"]) > 0.9


def test_settings_that_choose_tiles_are_kept_apart_and_old_ones_stay_equal(half_blurred, tmp_path):
    common = ["--slides", str(half_blurred), "--output_dir", str(tmp_path), "--tile_size", "128"]
    assert stage0_tile.main(common) == 0
    state = tmp_path / "state" / "half.json"
    stored = json.loads(state.read_text())
    assert stored["tiling"] == asdict(TilingSettings(tile_size=128))
    stored["tiling"] = {key: stored["tiling"][key] for key in ("tile_size", "mpp", "overlap", "min_tissue")}
    state.write_text(json.dumps(stored))  # as a version without these settings wrote it
    assert stage0_tile.main(common) == 0
    for flag, value in (("tissue_method", "hsv"), ("max_pen", "0.5"), ("max_edge", "0.0")):
        with pytest.raises(ValueError, match=f"tiled with --{flag} .*, not --{flag} {value}"):
            stage0_tile.main([*common, f"--{flag}", value])


@pytest.mark.parametrize("name", ARTEFACTS)
def test_limits_are_fractions(name):
    with pytest.raises(ValueError, match=f"--max_{name} 1.5: expected a fraction"):
        TilingSettings(**{f"max_{name}": 1.5})


def test_quality_must_fit_the_tiles(tmp_path):
    with pytest.raises(AssertionError):
        write_slide_coords(
            tmp_path / "s.h5",
            np.zeros((3, 2), int),
            name="s",
            mpp=0.5,
            tile_size=256,
            overlap=0,
            patch_size_level0=256,
            quality={"pen": np.zeros(2)},
        )
    assert not (tmp_path / "s.h5").exists()


def test_encode_cuts_tiles_by_the_same_flags(half_blurred, tmp_path):
    make_encoder(tmp_path / "encoder")
    flags = ("--slides", half_blurred, "--tile_size", 128, "--max_pen", 0.1, "--tissue_method", "hsv", "--output_dir")
    words = [str(word) for word in (*flags, tmp_path / "out", "--encoder", tmp_path / "encoder", "--num_workers", 1)]
    assert stage0_encode.main(words) == 0
    assert stage0_tile.main([str(word) for word in (*flags, tmp_path / "tiled")]) == 0
    tiled = read_slide_coords(tmp_path / "tiled" / "coords" / "half.h5")
    features = read_slide_features(tmp_path / "out" / "features" / "half.h5")
    np.testing.assert_array_equal(features.coords, tiled.coords)
    assert tiled.quality["pen"].max() <= 0.1
