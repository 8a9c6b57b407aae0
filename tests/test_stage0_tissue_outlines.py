import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.path import Path

from stage0_tiling.outlines import outline
from stage0_tiling.tissue import TissueMask


def area(ring):
    x, y = ring.T
    return (np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2


def filled(polygons, shape):
    """Rasterise polygons by testing the centre of each pixel."""
    centres = np.stack(np.meshgrid(np.arange(shape[1]) + 0.5, np.arange(shape[0]) + 0.5), -1).reshape(-1, 2)
    inside = np.zeros(len(centres), int)
    for exterior, holes in polygons:
        inside += Path(exterior).contains_points(centres)
        for hole in holes:
            inside -= Path(hole).contains_points(centres)
    return inside.reshape(shape)


@st.composite
def masks(draw):
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    return rng.random((draw(st.integers(1, 14)), draw(st.integers(1, 14)))) < draw(st.floats(0, 1))


@settings(deadline=None, max_examples=200)
@given(masks())
def test_outlines_hold_exactly_the_mask(mask):
    polygons = outline(mask)
    np.testing.assert_array_equal(filled(polygons, mask.shape), mask)
    for exterior, holes in polygons:
        assert area(exterior) > 0 and all(area(hole) < 0 for hole in holes)
        for ring in (exterior, *holes):
            assert len(np.unique(ring, axis=0)) == len(ring) >= 4, "a ring meets itself"
    assert sum(area(ring) for exterior, holes in polygons for ring in (exterior, *holes)) == mask.sum()


def test_a_hole_that_touches_the_rim_and_an_island_within():
    mask = np.ones((7, 7), bool)
    mask[1:6, 1:6] = False
    mask[3, 3] = True
    mask[0, 0] = False  # meets the hole in one corner
    polygons = outline(mask)
    assert [len(holes) for _, holes in polygons] == [1, 0]
    np.testing.assert_array_equal(filled(polygons, mask.shape), mask)


def test_contours_are_in_level0_pixels():
    mask = np.zeros((10, 20), bool)
    mask[2:5, 4:8] = True
    tissue = TissueMask(mask, np.zeros((10, 20, 3), np.uint8), scale_x=1 / 16, scale_y=1 / 32)
    [(exterior, holes)] = tissue.contours_level0()
    assert holes == [] and exterior.dtype == np.float64
    assert sorted(map(tuple, exterior.tolist())) == [(64, 64), (64, 160), (128, 64), (128, 160)]
    assert TissueMask(mask & False, tissue.picture, 1, 1).contours_level0() == []
