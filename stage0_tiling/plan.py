"""The tiles of one slide: settings in, positions out. What tile.py writes and what encode.py reads pixels for."""

from dataclasses import dataclass

import numpy as np

from stage0_tiling.pixel_size import PixelSize, SlideError, check_resolution
from stage0_tiling.slide import Slide
from stage0_tiling.slide_list import check_mpp
from stage0_tiling.tissue import Grid, TissueMask, find_tissue, make_grid, tiles_on_tissue

GUESSED_PIXEL_SIZE = PixelSize(0.5, 0.5, "assumed")


@dataclass(frozen=True)
class TilingSettings:
    """How slides are cut; equal settings give equal tiles.

    Attributes:
        tile_size: side of a tile in pixels at `mpp`.
        mpp: um per pixel of a tile.
        overlap: pixels at `mpp` that neighbouring tiles share.
        min_tissue: least fraction of a tile that is tissue.
    """

    tile_size: int = 256
    mpp: float = 0.5
    overlap: int = 0
    min_tissue: float = 0.1

    def __post_init__(self) -> None:
        if not 8 <= self.tile_size <= 8192:
            raise ValueError(f"--tile_size {self.tile_size}: expected 8 to 8192 pixels")
        if not 0 <= self.overlap < self.tile_size:
            raise ValueError(f"--overlap {self.overlap}: expected 0 to {self.tile_size - 1} pixels, less than a tile")
        if not 0 <= self.min_tissue <= 1:
            raise ValueError(f"--min_tissue {self.min_tissue}: expected a fraction, 0 to 1")
        try:
            check_mpp(self.mpp)
        except ValueError as error:
            raise ValueError(f"--mpp {self.mpp}: {error}") from error


@dataclass(frozen=True)
class TilePlan:
    """The tiles of one slide.

    Attributes:
        coords: (N, 2) int64, level-0 pixels, (x, y) of top-left corners, by y, then x; N = 0 where there is no tissue.
        grid: sizes of the tiles in level-0 pixels.
        tissue: the mask, with the thumbnail.
        pixel_size: um per level-0 pixel; None where it is unknown and the slide is blank anyway.
    """

    coords: np.ndarray
    grid: Grid
    tissue: TissueMask
    pixel_size: PixelSize | None


def plan_tiles(slide: Slide, settings: TilingSettings, assume_mpp: float | None = None) -> TilePlan:
    """Find the tissue of a slide and the tiles on it.

    Raises:
        SlideError: if the slide cannot be read, its mpp is unknown or implausible and none is assumed, or it is far
            coarser than the tiles asked for.
    """
    try:
        pixel_size = slide.pixel_size(assume_mpp)
    except SlideError:
        # a blank slide is blank at any mpp; only one with tissue needs the true value
        blank = find_tissue(slide, GUESSED_PIXEL_SIZE)
        if blank.mask.any():
            raise
        grid = make_grid(settings.tile_size, settings.overlap, settings.mpp, GUESSED_PIXEL_SIZE)
        return TilePlan(np.empty((0, 2), np.int64), grid, blank, None)
    check_resolution(slide.path.name, pixel_size, settings.mpp)
    grid = make_grid(settings.tile_size, settings.overlap, settings.mpp, pixel_size)
    tissue = find_tissue(slide, pixel_size)
    coords = tiles_on_tissue(tissue, slide.width, slide.height, grid, settings.min_tissue)
    return TilePlan(coords, grid, tissue, pixel_size)
