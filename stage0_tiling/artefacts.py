"""Artefacts of slides, and what fraction of each tile they cover.

pen    Marker ink, by hue and saturation that stains do not reach, and black ink; with the fringe of the stroke.
fold   Tissue that lies double is darker and more saturated than the rest: saturation minus value (the feature of
       Palokangas et al. 2007 and Kothari et al. 2013, J Pathol Inform 4:22), smoothed, well above what is usual on the
       slide. Tissue that is dense by nature, such as keratin or a lymph follicle in pale stroma, can be taken for one.
edge   Dark bands along the slide's border, and long, straight, thin, grey lines, as the edge of a coverslip is.
blur   Out of focus: little is left of the finest detail (variance of the Laplacian, Pech-Pacheco et al. 2000), by the
       variance of the grey levels themselves, so that neither stain nor density counts. It is judged on blocks of
       32 um at 1 um/px: a Gaussian blur of 2 um and more is found. Blocks without texture are not judged.

The first three are found on the thumbnail, strip by strip, so that memory beside it is a few bytes a pixel; blur is
read from the slide.
"""

import math
from functools import partial

import cv2
import numpy as np

from stage0_tiling.groups import drop_small, drop_unmarked, grow
from stage0_tiling.slide import PixelSize, Slide
from stage0_tiling.strips import map_strips, widen
from stage0_tiling.tissue import Grid, TissueMask, full_span, mask_span, sums_above_left
from stage0_tiling.tissue_methods import INK_MARGIN_UM, MIN_INK_UM2, is_dark, marker_ink
from stage0_tiling.white_balance import Balance, extremes, find_balance

ARTEFACTS = ("pen", "fold", "blur", "edge")
FINEST_MPP = 8.0
FOLD_SMOOTHING_UM = 16.0
FOLD_RISE = ((0.18, 1.5), (0.25, 2.3))  # above the median: by this, and by this many deviations; for rim and core
MIN_FOLD_UM2 = 5_000.0
STATISTICS_STEP = 7  # of the tissue's pixels, which are smooth, one in so many tells what is usual
BAND_SHARE = 0.4  # of the border that a dark band runs along
LINE_SHARE = 0.4  # of the slide's shorter side, least length of a line; where tissue crosses it, it is cut
LINE_WIDTH_UM = 150.0
LINE_ASPECT = 12.0
LINE_TINT = 24  # largest chroma of a line
LINE_DEPTH = 12  # grey levels that a line is darker than the glass beside it
EDGE_MARGIN_UM = 50.0
BLUR_MPP = 1.0
BLUR_BLOCK_UM = 32.0
BLUR_NOISE_PX = 0.8  # smoothing against noise of sensor and JPEG
BLUR_RATIO = 0.035
MIN_TEXTURE = 16.0  # variance of grey levels


def find_on_thumbnail(tissue: TissueMask, mpp: float) -> dict[str, np.ndarray]:
    """Find pens, folds and edges on a thumbnail of `mpp` um/px: name to (H, W) bool."""
    shape, mask, picture = tissue.mask.shape, tissue.mask, tissue.picture
    if mpp < FINEST_MPP:  # thumbnails of small slides are finer than strokes and folds need
        size = [max(1, round(side * mpp / FINEST_MPP)) for side in shape[::-1]]
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
        mask = cv2.resize(mask.view(np.uint8), size, interpolation=cv2.INTER_NEAREST).view(bool)
        mpp = FINEST_MPP
    balance = find_balance(picture, mpp)
    dark, pen = _dark_and_ink(picture, balance)
    edge = _border_bands(dark)
    dark &= ~edge
    pen |= dark
    grow(pen, INK_MARGIN_UM / mpp, only_large_px=MIN_INK_UM2 / mpp**2)
    grow(edge, EDGE_MARGIN_UM / mpp, only_large_px=0)
    lines = _straight_lines(picture, balance, edge | pen, mpp)
    grow(lines, EDGE_MARGIN_UM / mpp, only_large_px=0)
    edge |= lines
    found = {"pen": pen, "fold": _folds(picture, balance, mask & ~pen & ~edge, mpp), "edge": edge}
    if mask.shape == shape:
        return found
    resize = partial(cv2.resize, dsize=shape[::-1], interpolation=cv2.INTER_NEAREST)
    return {name: resize(where.view(np.uint8)).view(bool) for name, where in found.items()}


def tile_fractions(mask: np.ndarray, tissue: TissueMask, coords: np.ndarray, grid: Grid) -> np.ndarray:
    """What fraction of each tile a mask covers.

    Args:
        mask: (H, W) bool, in the pixels of the tissue mask.
        tissue: tells where these lie on the slide.
        coords: (N, 2) level-0 pixels, (x, y) of top-left corners.
        grid: size of a tile.

    Returns:
        (N,) float32, 0 to 1; what lies beyond the slide counts as not covered.
    """
    left, right = mask_span(coords[:, 0], grid.tile_width, tissue.scale_x, mask.shape[1])
    top, bottom = mask_span(coords[:, 1], grid.tile_height, tissue.scale_y, mask.shape[0])
    columns, (left, right) = _numbered(left, right)
    rows, (top, bottom) = _numbered(top, bottom)
    sums = sums_above_left(mask, rows, columns)
    area = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
    columns = full_span(coords[:, 0], grid.tile_width, tissue.scale_x)
    return (area / (columns * full_span(coords[:, 1], grid.tile_height, tissue.scale_y))).astype(np.float32)


def blur_fractions(slide: Slide, coords: np.ndarray, grid: Grid, pixel_size: PixelSize) -> np.ndarray:
    """What fraction of each tile's blocks is out of focus, (N,) float32; one tile is in memory at a time.

    Blocks without texture, such as glass, count as sharp. Slides coarser than 1 um/px are judged at what they have.
    """
    mpp = max(BLUR_MPP, pixel_size.mpp)
    block = max(8, round(BLUR_BLOCK_UM / mpp))
    blocks = [
        max(1, round(side * um / mpp / block))
        for side, um in ((grid.tile_width, pixel_size.x), (grid.tile_height, pixel_size.y))
    ]
    size = blocks[0] * block, blocks[1] * block
    found = np.empty(len(coords), np.float32)
    for index, (x, y) in enumerate(coords.tolist()):
        tile = slide.read_region(x, y, grid.tile_width, grid.tile_height, size)
        found[index] = is_blurred(cv2.cvtColor(tile, cv2.COLOR_RGB2GRAY), block).mean()
    return found


def is_blurred(grey: np.ndarray, block: int) -> np.ndarray:
    """Which blocks of (H, W) uint8 grey levels at about 1 um/px are out of focus, (H // block, W // block) bool."""
    smooth = cv2.GaussianBlur(grey.astype(np.float32), (0, 0), BLUR_NOISE_PX)
    detail = _block_means(cv2.Laplacian(smooth, cv2.CV_32F) ** 2, block)
    variance = _block_means(smooth**2, block) - _block_means(smooth, block) ** 2
    return (variance > MIN_TEXTURE) & (detail < BLUR_RATIO * variance)


def _block_means(values: np.ndarray, block: int) -> np.ndarray:
    rows, columns = values.shape[0] // block, values.shape[1] // block
    return values[: rows * block, : columns * block].reshape(rows, block, columns, block).mean(axis=(1, 3))


def _numbered(*values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different values of arrays, in order, and for each array which of them its values are."""
    different, numbers = np.unique(np.stack(values), return_inverse=True)
    return different, numbers


def _dark_and_ink(picture: np.ndarray, balance: Balance) -> tuple[np.ndarray, np.ndarray]:
    """Dark neutral pixels, and those of marker ink, both (H, W) bool."""
    dark, ink = (np.empty(picture.shape[:2], bool) for _ in range(2))

    def look(rows: slice) -> None:
        planes = balance.planes(picture, rows)
        brightest, darkest = extremes(planes)
        dark[rows], ink[rows] = is_dark(brightest, brightest - darkest), marker_ink(planes, brightest, darkest)

    map_strips(look, *dark.shape)
    return dark, ink


def _folds(picture: np.ndarray, balance: Balance, mask: np.ndarray, mpp: float) -> np.ndarray:
    """Groups of pixels of which all rise above the slide's tissue, and some far."""
    if not mask.any():
        return np.zeros_like(mask)
    sigma = FOLD_SMOOTHING_UM / mpp

    def difference(rows: slice) -> np.ndarray:
        """Saturation minus value, smoothed within the mask."""
        wide, inside = widen(rows, math.ceil(4 * sigma) + 1, len(mask))
        hsv = cv2.cvtColor(cv2.merge(balance.planes(picture, wide)), cv2.COLOR_RGB2HSV)
        _, saturation, value = cv2.split(hsv)
        weight = mask[wide].astype(np.float32)
        weighted = (saturation.astype(np.float32) - value) / 255 * weight
        blurred, total = (cv2.GaussianBlur(values, (0, 0), sigma)[inside] for values in (weighted, weight))
        return blurred / np.maximum(total, 1e-3)

    some = np.concatenate(
        map_strips(lambda rows: difference(rows)[mask[rows]][_first(mask, rows) :: STATISTICS_STEP], *mask.shape)
    )
    median = np.median(some)
    deviation = 1.4826 * np.median(np.abs(some - median))
    limits = [median + max(least, times * deviation) for least, times in FOLD_RISE]
    rim, core = (np.empty_like(mask) for _ in limits)

    def rises(rows: slice) -> None:
        values = difference(rows)
        for where, limit in zip((rim, core), limits, strict=True):
            np.logical_and(mask[rows], values > limit, out=where[rows])

    map_strips(rises, *mask.shape)
    if not core.any():
        return core
    drop_small(rim, MIN_FOLD_UM2 / mpp**2)
    drop_unmarked(rim, core)
    return rim


def _first(mask: np.ndarray, rows: slice) -> int:
    """Which of the strip's mask pixels is the first to be taken, if every STATISTICS_STEP-th of the whole mask is."""
    return -np.count_nonzero(mask[: rows.start]) % STATISTICS_STEP


def _border_bands(dark: np.ndarray) -> np.ndarray:
    """Dark groups that run along the picture's border or fill a corner of it."""
    if not dark.any():
        return dark
    count, labels = cv2.connectedComponents(dark.view(np.uint8), connectivity=8)
    is_band = np.zeros(count, bool)
    is_band[labels[[0, 0, -1, -1], [0, -1, 0, -1]]] = True
    for side in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
        is_band |= np.bincount(side, minlength=count) >= BAND_SHARE * len(side)
    is_band[0] = False
    return np.take(is_band, labels)


def _straight_lines(picture: np.ndarray, balance: Balance, other: np.ndarray, mpp: float) -> np.ndarray:
    """Long, straight and thin neutral lines, darker than what lies on both sides of them, beside other artefacts."""
    side = 2 * max(1, round(LINE_WIDTH_UM / mpp)) + 1
    kernel = np.ones((side, side), np.uint8)
    candidates = np.empty(other.shape, bool)

    def look(rows: slice) -> None:
        wide, inside = widen(rows, side, len(other))
        brightest, darkest = extremes(balance.planes(picture, wide))
        valleys = cv2.morphologyEx(darkest, cv2.MORPH_BLACKHAT, kernel)
        thin = (valleys > LINE_DEPTH) & (brightest - darkest < LINE_TINT)
        np.greater(thin[inside], other[rows], out=candidates[rows])

    map_strips(look, *other.shape)
    lines = np.zeros(candidates.shape, np.uint8)
    contours, _ = cv2.findContours(candidates.view(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    for contour in contours:
        _, sides, _ = cv2.minAreaRect(contour)
        length, thickness = max(sides), max(1.0, min(sides))
        is_thin = thickness * mpp <= LINE_WIDTH_UM and length >= LINE_ASPECT * thickness
        if is_thin and length >= LINE_SHARE * min(candidates.shape):
            cv2.drawContours(lines, [contour], -1, 1, -1)
    return lines.view(bool)
