from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stage0_tiling.plan import TilingSettings, plan_tiles
from stage0_tiling.slide import PixelSize, Slide
from stage0_tiling.tissue import Grid, TissueMask, find_tissue, make_grid, tiles_on_tissue
from tests.slides import INKS, PALE_PINK, DrawnSlide

SHARED_SLIDES = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "slides"

KINDS = {
    "white background": DrawnSlide(),
    "grey background": DrawnSlide(background=(200, 200, 202), seed=1),
    "yellowish background": DrawnSlide(background=(240, 233, 220), seed=2),
    "faint tissue": DrawnSlide(stain=PALE_PINK, seed=3),
    "coarse slide": DrawnSlide(width=1024, height=768, mpp=2.0, seed=4),
    "40x slide": DrawnSlide(mpp=0.25, seed=5),
    "black border": DrawnSlide(black_border=160, seed=6),
    "no pyramid": DrawnSlide(num_levels=1, seed=7),
} | {f"{ink} pen": DrawnSlide(pen=ink, seed=8 + i) for i, ink in enumerate(INKS)}


def tissue_of(path):
    with Slide(path) as slide:
        return find_tissue(slide, slide.pixel_size())


def overlap(drawn, tmp_path):
    """Intersection over union of the found and the exact mask, at level 0."""
    exact = drawn.write(tmp_path / "slide.tiff")
    found = tissue_of(tmp_path / "slide.tiff").mask
    found = cv2.resize(found.astype(np.uint8), exact.shape[::-1], interpolation=cv2.INTER_NEAREST) > 0
    return (found & exact).sum() / (found | exact).sum()


def test_tissue_is_found_on_all_kinds_of_slides(tmp_path, capsys):
    ious = {kind: overlap(drawn, tmp_path) for kind, drawn in KINDS.items()}
    with capsys.disabled():
        print(f"\nmean IoU of tissue masks {np.mean(list(ious.values())):.3f} over {len(ious)} kinds of slides:")
        print("  " + ", ".join(f"{kind} {iou:.3f}" for kind, iou in ious.items()))
    assert np.mean(list(ious.values())) >= 0.9
    assert min(ious.values()) >= 0.85, ious


@pytest.mark.parametrize("kind", ["white background", "faint tissue", "red pen"])
def test_the_coarser_mask_of_a_large_slide_chooses_the_same_tiles(kind, tmp_path, monkeypatch):
    """At 12 um/px, as a slide of 25 x 25 mm gets it: but for few at the rim, and the same share of the slide."""
    drawn = replace(KINDS[kind], mpp=4.0)
    drawn.write(tmp_path / "s.tiff")
    found = []
    with Slide(tmp_path / "s.tiff") as slide:
        for max_px in (2048**2, 1024 * 768 * (8 / 12.2) ** 2):
            monkeypatch.setattr("stage0_tiling.tissue.MASK_MAX_PX", max_px)
            found.append(plan_tiles(slide, TilingSettings(tile_size=32, mpp=4.0)))
    assert found[0].tissue.mask.shape == (768, 1024) and found[1].tissue.mask.shape == (504, 671)
    fine, coarse = ({tuple(xy) for xy in plan.coords.tolist()} for plan in found)
    assert len(fine & coarse) >= 0.97 * len(fine | coarse)
    assert found[0].tissue.fraction == pytest.approx(found[1].tissue.fraction, rel=0.02)


@pytest.mark.parametrize("ink", INKS)
def test_ink_alone_is_no_tissue(ink, tmp_path):
    DrawnSlide(pen=ink, pieces=()).write(tmp_path / "s.tiff")
    assert not tissue_of(tmp_path / "s.tiff").mask.any()


@pytest.mark.parametrize("background", [(255, 255, 255), (180, 180, 180), (244, 238, 228), (0, 0, 0)])
def test_empty_glass_is_no_tissue(background, tmp_path):
    DrawnSlide(background=background, pieces=()).write(tmp_path / "s.tiff")
    assert not tissue_of(tmp_path / "s.tiff").mask.any()


def test_a_picture_full_of_tissue_is_all_tissue(tmp_path):
    DrawnSlide(pieces=((0.5, 0.5, 3, 3, 0),)).write(tmp_path / "s.tiff")
    assert tissue_of(tmp_path / "s.tiff").fraction > 0.99


def test_faint_tissue_beside_dark_tissue_is_kept(tmp_path):
    dark, mask = DrawnSlide().draw()
    pale, _ = DrawnSlide(stain=PALE_PINK).draw()
    half = dark.shape[1] // 2
    Path(tmp_path / "s.png").parent.mkdir(exist_ok=True)
    cv2.imwrite(str(tmp_path / "s.png"), np.hstack([dark[:, :half], pale[:, half:]])[..., ::-1])
    with Slide(tmp_path / "s.png") as slide:
        found = find_tissue(slide, slide.pixel_size(assume_mpp=0.5)).mask
    found = cv2.resize(found.astype(np.uint8), mask.shape[::-1], interpolation=cv2.INTER_NEAREST) > 0
    assert (found & mask)[:, half:].sum() / mask[:, half:].sum() > 0.9


@pytest.mark.skipif(not SHARED_SLIDES.is_dir(), reason="the real slides in ../shared/data/slides are not here")
@pytest.mark.parametrize(
    ("name", "fraction"),
    [
        ("CMU-1-Small-Region.svs", (0.33, 0.43)),
        ("PIT_06_00633_01.tiff", (0.08, 0.12)),
        ("TCGA-CR-7395-01A-01-TS1.svs", (0.58, 0.68)),
        ("needle_biopsy.tif", (0.15, 0.25)),
    ],
)
def test_real_slides(name, fraction):
    with Slide(SHARED_SLIDES / name) as slide:
        tissue = find_tissue(slide, slide.pixel_size(assume_mpp=0.5))
    assert fraction[0] <= tissue.fraction <= fraction[1]


@st.composite
def masked_slides(draw):
    width, height = draw(st.integers(50, 3000)), draw(st.integers(50, 3000))
    columns, rows = draw(st.integers(5, 60)), draw(st.integers(5, 60))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    mask = rng.random((rows, columns)) < draw(st.floats(0, 0.6))
    picture = np.zeros((rows, columns, 3), np.uint8)
    tissue = TissueMask(mask, picture, columns / width, rows / height)
    tile_size = draw(st.integers(16, 400))
    overlap_px = draw(st.integers(0, tile_size - 1))
    pixel_size = PixelSize(draw(st.floats(0.2, 2.0)), draw(st.floats(0.2, 2.0)), "slide")
    grid = make_grid(tile_size, overlap_px, 0.5, pixel_size)
    # a lattice of single pixels over 3000 px would test numpy's memory, not the grid
    grid = Grid(grid.tile_width, grid.tile_height, max(grid.step_x, 8), max(grid.step_y, 8))
    return tissue, width, height, grid


@settings(deadline=None, max_examples=150)
@given(masked_slides(), st.floats(0, 1))
def test_tiles_keep_their_promises(example, min_tissue):
    tissue, width, height, grid = example
    coords = tiles_on_tissue(tissue, width, height, grid, min_tissue)
    assert coords.dtype == np.int64 and coords.shape[1] == 2
    assert (coords >= 0).all() and (coords < [width, height]).all()
    assert (coords % [grid.step_x, grid.step_y] == 0).all()
    assert len(np.unique(coords, axis=0)) == len(coords)
    assert (np.lexsort((coords[:, 0], coords[:, 1])) == np.arange(len(coords))).all()
    fewer = tiles_on_tissue(tissue, width, height, grid, min(1.0, min_tissue + 0.2))
    assert {tuple(xy) for xy in fewer.tolist()} <= {tuple(xy) for xy in coords.tolist()}


@settings(deadline=None, max_examples=100)
@given(masked_slides())
def test_tiles_cover_all_tissue_when_any_counts(example):
    tissue, width, height, grid = example
    if grid.step_x > grid.tile_width or grid.step_y > grid.tile_height:
        return  # the guard of masked_slides opened gaps between tiles
    covered = np.zeros_like(tissue.mask)
    for x, y in tiles_on_tissue(tissue, width, height, grid, min_tissue=0).tolist():
        columns = np.round(np.array([x, x + grid.tile_width]) * tissue.scale_x).astype(int)
        rows = np.round(np.array([y, y + grid.tile_height]) * tissue.scale_y).astype(int)
        covered[rows[0] : max(rows[1], rows[0] + 1), columns[0] : max(columns[1], columns[0] + 1)] = True
    assert covered[tissue.mask].all()


@given(st.integers(8, 1024), st.floats(0, 0.9), st.floats(0.1, 4), st.floats(0.1, 4))
def test_grid_is_exact_in_level0_pixels(tile_size, overlap_fraction, mpp, level0_mpp):
    overlap_px = int(overlap_fraction * tile_size)
    grid = make_grid(tile_size, overlap_px, mpp, PixelSize(level0_mpp, level0_mpp, "slide"))
    assert abs(grid.tile_width - tile_size * mpp / level0_mpp) <= 0.5 or grid.tile_width == 1
    shared = grid.tile_width - grid.step_x
    assert grid.step_x >= 1 and abs(shared - grid.tile_width * overlap_px / tile_size) <= 1
    if overlap_px == 0:
        assert grid.step_x == grid.tile_width


def test_tiles_share_exactly_the_overlap_asked_for(tmp_path):
    DrawnSlide(mpp=0.25, pieces=((0.5, 0.5, 3, 3, 0),)).write(tmp_path / "s.tiff")
    with Slide(tmp_path / "s.tiff") as slide:
        coords = plan_tiles(slide, TilingSettings(tile_size=128, mpp=0.5, overlap=32)).coords
    assert set(np.diff(np.unique(coords[:, 0]))) == set(np.diff(np.unique(coords[:, 1]))) == {256 - 64}


def test_fraction_of_tissue_decides():
    mask = np.zeros((16, 16), bool)
    mask[:8, :4] = True  # half of the first of 2 x 2 tiles
    tissue = TissueMask(mask, np.zeros((16, 16, 3), np.uint8), 16 / 512, 16 / 512)
    grid = Grid(256, 256, 256, 256)
    assert tiles_on_tissue(tissue, 512, 512, grid, 0.5).tolist() == [[0, 0]]
    assert tiles_on_tissue(tissue, 512, 512, grid, 0.51).tolist() == []


def test_settings_are_refused_by_the_name_of_their_flag():
    for wrong, flag in [
        ({"tile_size": 0}, "--tile_size"),
        ({"overlap": 256}, "--overlap"),
        ({"min_tissue": 1.5}, "--min_tissue"),
        ({"mpp": 50.0}, "--mpp"),
    ]:
        with pytest.raises(ValueError, match=flag):
            TilingSettings(**wrong)
