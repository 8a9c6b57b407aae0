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
    sides = [length / downsample for length in box]  # pixels of the level
    counts = [round(side / each) for side, each in zip(sides, compressed, strict=True)]
    whole = [count * each for count, each in zip(counts, compressed, strict=True)]
    shrink = next((n for n in shrinks if tuple(side // n for side in whole) == size), 0)
    if not shrink or not all(counts):
        return None
    first = coords / downsample
    places = np.rint(first / compressed)
    begins = places * compressed
    beyond = first - begins  # the grid, at the left or top, and at the right or bottom
    is_on_grid = abs(beyond) <= ON_GRID
    is_on_grid &= abs(beyond + (np.array(sides) - whole)) <= ON_GRID
    is_on_grid &= (begins >= 0) & (begins <= np.array(dimensions) - whole)
    index = np.flatnonzero(is_on_grid[:, 0] & is_on_grid[:, 1])
    if len(index) == 0:
        return None
    columns, rows = places[index].astype(np.int64).T
    return Alignment(index, rows, columns, down=counts[1], across=counts[0], shrink=shrink)
