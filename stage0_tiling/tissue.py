"""Where the tissue lies: a mask from a thumbnail, and the grid of tiles that it carries.

The mask follows the common recipe, a threshold on saturation found by Otsu's method on a thumbnail (Otsu 1979; the use
on slides e.g. Lu et al. 2021, CLAM), with what experience asks for: white balance first, so that grey and tinted
backgrounds are neutral; dark neutral pixels (scanner borders, black ink) and marker ink taken out before the threshold
is sought; bounds on the threshold, so that faint tissue beside dark tissue is kept and an empty slide stays empty; and
clean-up in um², not pixels.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np

from stage0_tiling.outlines import Polygon, outline
from stage0_tiling.slide import PixelSize, Slide

MASK_MPP = 8.0
MASK_MIN_SIDE = 512  # small slides get a finer mask, their tissue is small as well
MASK_MAX_SIDE = 4096
DARK = 70  # brightest channel of scanner borders and black ink
NEUTRAL = 40  # largest chroma of what counts as grey
TINT = 30  # largest chroma of a background
CHROMA_RANGE = (7, 12)  # bounds of the threshold: below is JPEG noise, above is tissue in any stain
MEDIAN_UM = 20.0
CLOSING_UM = 20.0
INK_MARGIN_UM = 50.0  # the fringe of a pen stroke looks like tissue
MIN_TISSUE_UM2 = 3_000.0  # the strands of a biopsy are larger, dust is smaller
MAX_HOLE_UM2 = 20_000.0  # larger is a lumen, fat or a tear
MIN_INK_UM2 = 5_000.0  # ink comes in strokes, a few odd pixels are tissue


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


def find_tissue(slide: Slide, pixel_size: PixelSize) -> TissueMask:
    """Read a thumbnail at about 8 um/px (finer for small slides, never finer than level 0) and find its tissue."""
    width_um, height_um = slide.width * pixel_size.x, slide.height * pixel_size.y
    long_side = max(width_um, height_um)
    mpp = min(max(MASK_MPP, long_side / MASK_MAX_SIDE), max(long_side / MASK_MIN_SIDE, pixel_size.mpp))
    width, height = max(1, round(width_um / mpp)), max(1, round(height_um / mpp))
    picture = slide.read_whole(width, height)
    return TissueMask(tissue_mask(picture, mpp), picture, width / slide.width, height / slide.height)


def tissue_mask(picture: np.ndarray, mpp: float) -> np.ndarray:
    """Find the tissue of a picture.

    Args:
        picture: (H, W, 3) uint8 RGB.
        mpp: microns per pixel of the picture.

    Returns:
        (H, W) bool.
    """
    smooth = cv2.medianBlur(picture, _odd(MEDIAN_UM / mpp))
    balanced = _white_balance(smooth)
    brightest, darkest = _extremes(balanced)
    chroma = brightest - darkest
    dark = (brightest < DARK) & (chroma < NEUTRAL)
    excluded = _grow(dark | _marker_ink(balanced), INK_MARGIN_UM / mpp, only_large_px=MIN_INK_UM2 / mpp**2)
    tissue = (chroma > _threshold(chroma[~excluded])) & ~excluded
    tissue = cv2.morphologyEx(tissue.astype(np.uint8), cv2.MORPH_CLOSE, _disc(CLOSING_UM / 2 / mpp)).astype(bool)
    tissue = _without_small(tissue & ~excluded, MIN_TISSUE_UM2 / mpp**2)
    return ~_without_small(~tissue, MAX_HOLE_UM2 / mpp**2)


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
    left, right = _mask_span(xs, grid.tile_width, tissue.scale_x, tissue.mask.shape[1])
    top, bottom = _mask_span(ys, grid.tile_height, tissue.scale_y, tissue.mask.shape[0])
    sums = cv2.integral(tissue.mask.astype(np.uint8)).astype(np.int64)
    area = sums[np.ix_(bottom, right)] - sums[np.ix_(top, right)] - sums[np.ix_(bottom, left)] + sums[np.ix_(top, left)]
    whole = np.outer(_full_span(ys, grid.tile_height, tissue.scale_y), _full_span(xs, grid.tile_width, tissue.scale_x))
    rows, columns = np.nonzero((area > 0) & (area >= min_tissue * whole))
    return np.stack([xs[columns], ys[rows]], axis=1).astype(np.int64)


def _mask_span(starts: np.ndarray, length: int, scale: float, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """First and last (excluded) mask pixel of each tile, cut at the slide's edge. Neighbours share no pixel."""
    first = np.minimum(np.round(starts * scale).astype(np.int64), limit - 1)
    last = np.minimum(np.round((starts + length) * scale).astype(np.int64), limit)
    return first, np.maximum(last, first + 1)


def _full_span(starts: np.ndarray, length: int, scale: float) -> np.ndarray:
    return np.maximum(np.round((starts + length) * scale) - np.round(starts * scale), 1)


def _white_balance(picture: np.ndarray) -> np.ndarray:
    """Scale channels so that the background is white; a picture without a bright, near-neutral one stays as it is."""
    brightest, darkest = _extremes(picture)
    candidates = (brightest - darkest <= TINT) & (brightest > 140)
    if np.count_nonzero(candidates) < 0.005 * brightest.size:
        return picture
    level = int(np.bincount(brightest[candidates], minlength=256).argmax())
    background = np.median(picture[candidates & (brightest >= level - 4) & (brightest <= level + 4)], axis=0)
    balanced = np.clip(np.arange(256)[:, None] * (255.0 / background), 0, 255).astype(np.uint8)
    return cv2.LUT(picture, balanced[None])


def _extremes(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Brightest and darkest channel of each pixel; channel by channel, which is ten times as fast as along an axis."""
    red, green, blue = cv2.split(picture)
    return cv2.max(cv2.max(red, green), blue), cv2.min(cv2.min(red, green), blue)


def _marker_ink(picture: np.ndarray) -> np.ndarray:
    """Pixels of marker pens: pairs of hue and saturation that H&E, DAB and haematoxylin do not reach."""
    hue, saturation, value = cv2.split(cv2.cvtColor(picture, cv2.COLOR_RGB2HSV))
    yellow = (hue > 24) & (hue <= 35) & (saturation > 150)
    green = (hue > 35) & (hue <= 90) & (saturation > 60)
    blue = (hue > 90) & (hue <= 124) & (saturation > 130)
    red = ((hue <= 5) | (hue >= 174)) & (saturation > 190) & (value > 110)
    return yellow | green | blue | red


def _threshold(chroma: np.ndarray) -> float:
    """Otsu's threshold, held between noise and the chroma that is tissue in any stain."""
    if chroma.size == 0:
        return CHROMA_RANGE[1]
    otsu, _ = cv2.threshold(chroma.reshape(-1, 1), 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    return float(np.clip(otsu, *CHROMA_RANGE))


def _grow(mask: np.ndarray, radius_px: float, only_large_px: float) -> np.ndarray:
    large = _without_small(mask, only_large_px)
    return cv2.dilate(large.astype(np.uint8), _disc(radius_px)).astype(bool)


def _without_small(mask: np.ndarray, min_px: float) -> np.ndarray:
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    keep = stats[:, cv2.CC_STAT_AREA] >= min_px
    keep[0] = False
    return keep[labels]


def _disc(radius_px: float) -> np.ndarray:
    side = 2 * max(1, round(radius_px)) + 1
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))


def _odd(size: float) -> int:
    return max(3, 2 * math.floor(size / 2) + 1)
