"""Tiles that are whole compressed tiles of the file, found for a whole slide at once: nothing to cut, paste or keep."""

from dataclasses import dataclass

import numpy as np

from stage0_tiling.resample import ON_GRID


@dataclass(frozen=True)
class Alignment:
    """How tiles lie on a level's grid of compressed tiles.

    Attributes:
        index: (M,) of the tiles that lie on it.
        rows: (M,) of the compressed tile at their top left.
        columns: (M,) of the same.
        down: compressed tiles from top to bottom of a tile.
        across: compressed tiles from left to right.
        shrink: by which the compressed tiles are to be divided.
    """

    index: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    down: int
    across: int
    shrink: int


def align(
    coords: np.ndarray,
    box: tuple[int, int],
    size: tuple[int, int],
    *,
    downsample: float,
    dimensions: tuple[int, int],
    compressed: tuple[int, int],
    shrinks: tuple[int, ...],
) -> Alignment | None:
    """Find the tiles that consist of whole compressed tiles, of which none reaches beyond the level.

    Args:
        coords: (N, 2) level-0 (x, y) of top-left corners.
        box: (width, height) of the tiles in level-0 pixels.
        size: (width, height) of the tiles in pixels of the picture.
        downsample: level-0 pixels per pixel of the level.
        dimensions: (width, height) of the level in its pixels.
        compressed: (width, height) of a compressed tile in pixels of the level.
        shrinks: factors that compressed tiles can be divided by.

    Returns:
        None if not a single tile does.
    """
    side = np.array(box) / downsample  # pixels of the level
    each = np.array(compressed)
    counts = np.round(side / each).astype(int)
    shrink = next((n for n in shrinks if tuple(counts * each // n) == size), 0)
    if not shrink or not counts.all():
        return None
    first = coords / downsample
    places = np.round(first / each).astype(int)
    begins, ends = places * each, (places + counts) * each
    is_on_grid = (abs(first - begins) <= ON_GRID) & (abs(first + side - ends) <= ON_GRID)
    index = np.flatnonzero((is_on_grid & (begins >= 0) & (ends <= dimensions)).all(axis=1))
    if len(index) == 0:
        return None
    columns, rows = places[index].T
    return Alignment(index, rows, columns, down=int(counts[1]), across=int(counts[0]), shrink=shrink)
