"""Tissue and artefacts as fast and lean as the stage finds them, against the same recipes written down plainly."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stage0_tiling import strips, tissue_methods, white_balance
from stage0_tiling.artefacts import find_on_thumbnail, tile_fractions
from stage0_tiling.groups import close_gaps, disc, drop_small, drop_unmarked, fill_small, grow
from stage0_tiling.tissue import Grid, TissueMask, sums_above_left
from stage0_tiling.tissue_methods import METHODS, chroma_threshold, tissue_mask
from stage0_tiling.white_balance import find_balance
from tests.plain_tissue import plain_artefacts, plain_grow, plain_mask, plain_threshold, plain_without_small
from tests.slides import INKS, PALE_PINK, DrawnSlide


@pytest.fixture(autouse=True)
def thin_strips(monkeypatch):
    """Strips of a few rows, so that these small pictures have many of them."""
    monkeypatch.setattr(strips, "STRIP_PX", 3000)


def picture(shrink=2, **how):
    drawn, _ = DrawnSlide(width=1024, height=768, **how).draw()
    return cv2.resize(drawn, None, fx=1 / shrink, fy=1 / shrink, interpolation=cv2.INTER_AREA)


CASES = {
    "plain": (4.0, {}),
    "pale on grey": (4.0, {"background": (200, 200, 202), "stain": PALE_PINK, "seed": 1}),
    "tinted": (8.0, {"background": (240, 233, 220), "seed": 2}),
    "black border": (4.0, {"black_border": 160, "seed": 6}),
    "blank": (2.0, {"pieces": ()}),
    "all tissue": (2.0, {"pieces": ((0.5, 0.5, 3, 3, 0),)}),
    "specks and holes": (1.0, {"seed": 9, "shrink": 16}),
} | {f"{ink} pen": (4.0, {"pen": ink, "seed": 8}) for ink in INKS}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CASES)
def test_the_fast_mask_is_the_plain_one(name, method):
    mpp, how = CASES[name]
    shown = picture(**how)
    np.testing.assert_array_equal(tissue_mask(shown, mpp, method), plain_mask(shown, mpp, method))


@pytest.mark.parametrize(("colour", "shape"), [((120, 40, 90), (60, 80)), ((255, 255, 255), (1, 1))])
def test_the_fast_mask_is_the_plain_one_without_any_glass(colour, shape):
    shown = np.full((*shape, 3), colour, np.uint8)
    np.testing.assert_array_equal(tissue_mask(shown, 8.0), plain_mask(shown, 8.0))


@pytest.mark.parametrize("seed", range(12))
def test_the_fast_mask_is_the_plain_one_on_clouds(seed):
    """Groups and holes of all sizes, on glass of odd and even numbers of pixels, so that medians of both are met."""
    rng = np.random.default_rng(seed)
    cloud = cv2.GaussianBlur(rng.standard_normal((101 + seed, 133)).astype(np.float32), (0, 0), 1 + seed / 4)
    shown = np.full((*cloud.shape, 3), rng.integers(215, 250, 3), np.uint8)
    shown[cloud > 0.3 * cloud.std()] = rng.integers(20, 230, 3)
    shown = np.clip(shown + rng.normal(0, 3, shown.shape), 0, 255).astype(np.uint8)
    mask = tissue_mask(shown, mpp=8.0)
    np.testing.assert_array_equal(mask, plain_mask(shown, 8.0))


@pytest.mark.parametrize("name", ["plain", "pale on grey", "tinted", "black border", "blue pen"])
def test_an_eighth_of_the_rows_tells_the_colour_of_the_glass(name, monkeypatch):
    """As on the thumbnails of the largest slides: gains differ by 2 levels at most, masks by few pixels."""
    mpp, how = CASES[name]
    shown = picture(**how)
    all_rows, whole = find_balance(shown, mpp), tissue_mask(shown, mpp)
    monkeypatch.setattr(white_balance, "SAMPLE_PX", shown.shape[0] * shown.shape[1] // 8)
    some_rows, sampled = find_balance(shown, mpp), tissue_mask(shown, mpp)
    assert np.abs(all_rows.gains.astype(int) - some_rows.gains).max() <= 2
    assert (whole == sampled).mean() >= 0.999


@pytest.mark.parametrize("seed", range(3))
def test_colours_of_all_kinds_are_judged_as_plainly(seed):
    """Each pixel a colour of its own, in blocks that the median filter leaves: what is ink, dark or neither is the
    same to the bit, also where strips are passed over because nothing in them can be ink."""
    rng = np.random.default_rng(seed)
    colours = rng.integers(0, 256, (40, 25, 3)) // (1 + seed) + 80 * (seed == 2)
    colours[:13] = colours[:13].mean(axis=2, keepdims=True) + rng.integers(-8, 9, (13, 25, 3))
    shown = np.clip(colours, 0, 255).astype(np.uint8).repeat(6, axis=0).repeat(6, axis=1)
    for method in METHODS:
        np.testing.assert_array_equal(tissue_mask(shown, 8.0, method), plain_mask(shown, 8.0, method))


@given(st.lists(st.integers(0, 255), min_size=1, max_size=200), st.lists(st.integers(5, 15), max_size=200))
def test_the_threshold_of_a_histogram_is_that_of_its_values(some, near):
    values = np.array(some + near, np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tissue_methods, "CHROMA_RANGE", (0, 255))
        found, expected = chroma_threshold(np.bincount(values, minlength=256)), plain_threshold(values)
    # where two thresholds part the values equally well, rounding decides
    assert found == expected or variance_between(values, found) == pytest.approx(variance_between(values, expected))


def variance_between(values, threshold):
    low, high = values[values <= threshold], values[values > threshold]
    return len(low) * len(high) * (low.mean() - high.mean()) ** 2 if len(low) and len(high) else 0


@st.composite
def masks(draw):
    """Masks from noise to blobs, of odd sizes, in strips of one row and more."""
    height, width = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    noise = rng.standard_normal((height, width)).astype(np.float32)
    smoothness = draw(st.sampled_from([0, 1, 2, 4]))
    cloud = cv2.GaussianBlur(noise, (0, 0), smoothness) if smoothness else noise
    return cloud > np.quantile(cloud, draw(st.floats(0, 1))), draw(st.integers(1, 1000)), rng


@settings(deadline=None, max_examples=300)
@given(masks(), st.floats(0, 60))
def test_groups_that_cross_strips_are_counted_whole(example, least):
    mask, strip_px, rng = example
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strips, "STRIP_PX", strip_px)
        kept = mask.copy()
        drop_small(kept, least)
        np.testing.assert_array_equal(kept, plain_without_small(mask, least))
        filled = mask.copy()
        fill_small(filled, least)
        np.testing.assert_array_equal(filled, ~plain_without_small(~mask, least))
        marks = rng.random(mask.shape) < 0.02
        marked = mask.copy()
        drop_unmarked(marked, marks)
        _, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
        np.testing.assert_array_equal(marked, np.isin(labels, np.unique(labels[marks & mask])) & mask)
        grown = mask.copy()
        grow(grown, 3, least)
        np.testing.assert_array_equal(grown, plain_grow(mask, 3, least))
        closed = mask.copy()
        close_gaps(closed, 2)
        plainly = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_CLOSE, disc(2))
        np.testing.assert_array_equal(closed, plainly.astype(bool))
        rows, columns = rng.integers(0, mask.shape[0] + 1, 9), rng.integers(0, mask.shape[1] + 1, 7)
        table = cv2.integral(mask.astype(np.uint8))
        np.testing.assert_array_equal(sums_above_left(mask, rows, columns), table[np.ix_(rows, columns)])


@pytest.mark.parametrize("ink", INKS)
def test_artefacts_are_those_found_plainly(ink):
    shown, mask = DrawnSlide(width=600, height=450, pen=ink, black_border=40, seed=3).draw()
    shown = shown.copy()
    cv2.line(shown, (500, 0), (505, 449), (200, 200, 200), 2)
    fold = np.zeros(mask.shape, np.uint8)
    cv2.line(fold, (170, 0), (320, 449), 1, 12)
    where = (fold > 0) & mask
    shown[where] = (245 * (shown[where] / 245.0) ** 2).astype(np.uint8)
    tissue = TissueMask(tissue_mask(shown, 8.0), shown, 1 / 16, 1 / 16)
    found, expected = find_on_thumbnail(tissue, 8.0), plain_artefacts(shown, tissue.mask, 8.0)
    assert found.keys() == expected.keys() and found["fold"].any() and found["edge"].any()
    assert found["pen"].any() or ink == "black"  # which here runs into the border, so that it counts as a band
    for name, mask in found.items():
        np.testing.assert_array_equal(mask, expected[name])
    coords = np.array([[x, y] for y in range(0, 7200, 300) for x in range(0, 9600, 256)])
    table = cv2.integral(found["pen"].astype(np.uint8))
    left, top = np.round(coords / 16).astype(int).T
    right, bottom = (
        np.minimum(np.round((coords[:, axis] + 256) / 16).astype(int), side) for axis, side in ((0, 600), (1, 450))
    )
    area = table[bottom, right] - table[top, right] - table[bottom, left] + table[top, left]
    fractions = tile_fractions(found["pen"], tissue, coords, Grid(256, 256, 256, 300))
    np.testing.assert_allclose(fractions, area / 256, atol=1e-6)
