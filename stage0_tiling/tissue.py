"""Where the tissue lies: a mask from a thumbnail, and the grid of tiles that it carries."""

import math
from dataclasses import dataclass

import cv2
import numpy as np

from stage0_tiling.memory import return_free_memory
from stage0_tiling.outlines import Polygon, outline
from stage0_tiling.slide import PixelSize, Slide
from stage0_tiling.strips import strips
from stage0_tiling.tissue_methods import tissue_mask

MASK_MPP = 8.0
MASK_MIN_SIDE = 512  # small slides get a finer mask, their tissue is small as well
MASK_MAX_PX = 2048 * 2048  # slides of more than 270 mm² get a coarser one, so that memory stays bounded


@dataclass(frozen=True)
class TissueMask:
    """Tissue of a slide at low resolution.

    Attributes:
        mask: (H, W) bool.
        picture: (H, W, 3) uint8 RGB, the thumbnail that it was found on.
        scale_x: mask pixels per level-0 pixel along x.
        scale_y: mask pixels per level-0 pixel along y.
    """

    mask: np.ndarray
    picture: np.ndarray
    scale_x: float
    scale_y: float

    @property
    def fraction(self) -> float:
        """Tissue area over slide area."""
        return float(self.mask.mean())

    def contours_level0(self) -> list[Polygon]:
        """Outline the tissue as (exterior, holes) pairs of (V, 2) float64 (x, y) in level-0 pixels; see `outline`."""
        scale = np.array([self.scale_x, self.scale_y])
        return [(exterior / scale, [hole / scale for hole in holes]) for exterior, holes in outline(self.mask)]


@dataclass(frozen=True)
class Grid:
    """A regular lattice of tiles over level 0, anchored at (0, 0).

    Attributes:
        tile_width: level-0 pixels.
        tile_height: level-0 pixels; differs from `tile_width` only where pixels are not square.
        step_x: level-0 pixels from tile to tile.
        step_y: level-0 pixels from tile to tile.
    """

    tile_width: int
    tile_height: int
    step_x: int
    step_y: int


def find_tissue(slide: Slide, pixel_size: PixelSize, method: str = "otsu") -> TissueMask:
    """Read a thumbnail and find its tissue by one of the methods of tissue_methods.py."""
    picture, mpp = read_thumbnail(slide, pixel_size)
    height, width = picture.shape[:2]
    mask = tissue_mask(picture, mpp, method)
    if height * width > MASK_MAX_PX // 2:
        return_free_memory()  # before the tiles are laid and read
    return TissueMask(mask, picture, width / slide.width, height / slide.height)


def read_thumbnail(slide: Slide, pixel_size: PixelSize) -> tuple[np.ndarray, float]:
    """Read a thumbnail at 8 um/px, finer for small slides but never than level 0, coarser for large; with its um/px."""
    width_um, height_um = slide.width * pixel_size.x, slide.height * pixel_size.y
    mpp = max(MASK_MPP, math.sqrt(width_um * height_um / MASK_MAX_PX))
    mpp = min(mpp, max(max(width_um, height_um) / MASK_MIN_SIDE, pixel_size.mpp))
    width, height = max(1, round(width_um / mpp)), max(1, round(height_um / mpp))
    return slide.read_whole(width, height), mpp


def make_grid(tile_size: int, overlap: int, mpp: float, pixel_size: PixelSize) -> Grid:
    """Grid of tiles of `tile_size` pixels at `mpp` that share `overlap` pixels; sizes are rounded to level-0 pixels."""
    tile_width, tile_height = (max(1, round(tile_size * mpp / um)) for um in (pixel_size.x, pixel_size.y))
    step_x, step_y = (max(1, side - round(side * overlap / tile_size)) for side in (tile_width, tile_height))
    return Grid(tile_width, tile_height, step_x, step_y)


def tiles_on_tissue(tissue: TissueMask, width: int, height: int, grid: Grid, min_tissue: float) -> np.ndarray:
    """Choose the tiles that hold tissue.

    Args:
        tissue: mask of the slide.
        width: level-0 pixels of the slide.
        height: level-0 pixels of the slide.
        grid: the lattice to choose from.
        min_tissue: least fraction of a tile that is tissue, 0 to 1; with 0 every tile that holds any.

    Returns:
        (N, 2) int64 (x, y) of top-left corners in level-0 pixels, by y, then x. Corners are multiples of the grid's
        step and inside the slide; a tile at the right or bottom edge may reach beyond it, and what lies there counts
        as no tissue. With `min_tissue` 0 the tiles cover all tissue.
    """
    xs, ys = np.arange(0, width, grid.step_x), np.arange(0, height, grid.step_y)
    left, right = mask_span(xs, grid.tile_width, tissue.scale_x, tissue.mask.shape[1])
    top, bottom = mask_span(ys, grid.tile_height, tissue.scale_y, tissue.mask.shape[0])
    sums = sums_above_left(tissue.mask, np.concatenate([top, bottom]), np.concatenate([left, right]))
    upper, lower = sums[: len(ys)], sums[len(ys) :]
    area = lower[:, len(xs) :] - upper[:, len(xs) :] - lower[:, : len(xs)] + upper[:, : len(xs)]
    whole = np.outer(full_span(ys, grid.tile_height, tissue.scale_y), full_span(xs, grid.tile_width, tissue.scale_x))
    rows, columns = np.nonzero((area > 0) & (area >= min_tissue * whole))
    return np.stack([xs[columns], ys[rows]], axis=1).astype(np.int64)


def mask_span(starts: np.ndarray, length: int, scale: float, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """First and last (excluded) mask pixel of each tile, cut at the slide's edge. Neighbours share no pixel."""
    first = np.minimum(np.round(starts * scale).astype(np.int64), limit - 1)
    last = np.minimum(np.round((starts + length) * scale).astype(np.int64), limit)
    return first, np.maximum(last, first + 1)


def sums_above_left(mask: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Count the pixels of (H, W) bool above each of some rows and left of each of some columns, (R, C) int32.

    A summed-area table, of which only what is asked for is kept: the whole would take eight times the mask's memory.
    """
    found = np.zeros((len(rows), len(columns)), np.int32)
    above = np.zeros(len(columns), np.int32)
    for part in strips(*mask.shape):
        sums = cv2.integral(mask[part].view(np.uint8))[:, columns]
        here = np.flatnonzero((rows > part.start) & (rows <= part.stop))
        found[here] = above + sums[rows[here] - part.start]
        above += sums[-1]
    return found


def full_span(starts: np.ndarray, length: int, scale: float) -> np.ndarray:
    """Mask pixels of each whole tile along one axis, those beyond the slide among them."""
    return np.maximum(np.round((starts + length) * scale) - np.round(starts * scale), 1)
