"""Which pixels of a thumbnail are tissue, by three recipes.

otsu     A threshold on chroma found by Otsu's method (Otsu 1979; the use on slides e.g. Lu et al. 2021, CLAM), with
         what experience asks for: white balance first, so that grey and tinted backgrounds are neutral, and bounds on
         the threshold, so that faint tissue beside dark tissue is kept and an empty slide stays empty.
hsv      Fixed bounds on hue, saturation and value, those by which training tiles of pathology foundation models were
         chosen (Karasikov et al. 2025, arXiv:2504.05186): the same on every slide, for H&E of common scanners.
entropy  Where grey levels are mixed (after EntropyMasker, Song et al. 2023, doi:10.1038/s41598-023-29638-1) or well
         below those of the glass: colour does not matter, so unstained, pale and immunostained tissue is found.

In all of them the glass is made white first, dark neutral pixels (scanner borders, black ink) and marker ink are no
tissue, and clean-up is in um². They go through the thumbnail strip by strip: beside it and the mask, memory does not
grow with it.
"""

import cv2
import numpy as np

from stage0_tiling.groups import close_gaps, disc, drop_small, fill_small, grow
from stage0_tiling.strips import map_strips, widen
from stage0_tiling.white_balance import Balance, Planes, extremes, find_balance, histogram, odd

METHODS = ("otsu", "hsv", "entropy")
DARK = 70  # brightest channel of scanner borders and black ink
NEUTRAL = 40  # largest chroma of what counts as grey
CHROMA_RANGE = (7, 12)  # bounds of the threshold: below is JPEG noise, above is tissue in any stain
HSV_RANGE = ((90, 8, 103), (180, 255, 255))  # hue in 2 degrees, as OpenCV has it
CLOSING_UM = 20.0
INK_MARGIN_UM = 50.0  # the fringe of a pen stroke looks like tissue
MIN_TISSUE_UM2 = 3_000.0  # the strands of a biopsy are larger, dust is smaller
MAX_HOLE_UM2 = 20_000.0  # larger is a lumen, fat or a tear
MIN_INK_UM2 = 5_000.0  # ink comes in strokes, a few odd pixels are tissue
ENTROPY_WINDOW_UM = 56.0
ENTROPY_BITS = 1.2  # glass has one grey level, give or take its noise; the edge of a shadow has two
ENTROPY_BINS = 24
GLASS_TINT = 12  # largest chroma of glass once it is balanced
PURE_WHITE = 253
LEAST_BIN = 5.0  # grey levels; JPEG moves a flat surface by less


def tissue_mask(picture: np.ndarray, mpp: float, method: str = "otsu") -> np.ndarray:
    """Find the tissue of a picture.

    Args:
        picture: (H, W, 3) uint8 RGB.
        mpp: microns per pixel of the picture.
        method: one of METHODS.

    Returns:
        (H, W) bool.
    """
    height, width = picture.shape[:2]
    balance = find_balance(picture, mpp)
    found, excluded = np.empty((height, width), np.uint8), np.zeros((height, width), bool)

    def look(rows: slice) -> tuple[bool, np.ndarray]:
        """Whether some of it is excluded, and how often each level occurs that a threshold is found on."""
        planes = balance.planes(picture, rows)
        brightest, darkest = extremes(planes)
        chroma = brightest - darkest
        dark = is_dark(brightest, chroma) | marker_ink(planes, brightest, darkest)
        if some := bool(dark.any()):
            excluded[rows] = dark
        if method == "entropy":
            grey = cv2.cvtColor(balance.smooth(picture, rows), cv2.COLOR_RGB2GRAY)
            return some, histogram(grey, (chroma <= GLASS_TINT).view(np.uint8))
        found[rows] = chroma if method == "otsu" else in_hsv_range(planes)
        return some, histogram(chroma)

    some, counts = zip(*map_strips(look, height, width), strict=True)
    counts = sum(counts)
    if any(some):
        grow(excluded, INK_MARGIN_UM / mpp, only_large_px=MIN_INK_UM2 / mpp**2)
    excluded = excluded if any(some) and excluded.any() else None
    if method == "otsu":
        if excluded is not None:
            counts = sum(
                map_strips(lambda rows: histogram(found[rows], (~excluded[rows]).view(np.uint8)), height, width)
            )
        np.greater(found, chroma_threshold(counts), out=found.view(bool))
    elif method == "entropy":
        _find_mixed(picture, balance, _glass(counts, picture.shape[0] * picture.shape[1]), mpp, out=found)
    return _clean(found.view(bool), excluded, mpp)


def is_dark(brightest: np.ndarray, chroma: np.ndarray) -> np.ndarray:
    """Dark neutral pixels, (H, W) bool: black ink, and what the scanner left black."""
    return (brightest < DARK) & (chroma < NEUTRAL)


def marker_ink(planes: Planes, brightest: np.ndarray, darkest: np.ndarray) -> np.ndarray:
    """Pixels of marker pens: pairs of hue and saturation that H&E, DAB and haematoxylin do not reach.

    Args:
        planes: red, green and blue, (H, W) uint8 each.
        brightest: the largest of them in each pixel, (H, W) uint8.
        darkest: the smallest.

    Returns:
        (H, W) bool.
    """
    # Few pixels need a closer look: the inks below are of a saturation of half and more, but for green, which is of a
    # quarter and has green for its brightest channel.
    may_be = darkest <= brightest >> 1
    may_be |= (planes[1] == brightest) & (brightest - darkest > brightest >> 3)
    where = np.flatnonzero(may_be)
    if len(where) == 0:
        return may_be
    colours = np.stack([plane.ravel()[where] for plane in planes], axis=1)
    hue, saturation, value = cv2.cvtColor(colours[None], cv2.COLOR_RGB2HSV)[0].T
    yellow = (hue > 24) & (hue <= 35) & (saturation > 150)
    green = (hue > 35) & (hue <= 90) & (saturation > 60)
    blue = (hue > 90) & (hue <= 124) & (saturation > 130)
    red = ((hue <= 5) | (hue >= 174)) & (saturation > 190) & (value > 110)
    may_be.ravel()[where] = yellow | green | blue | red
    return may_be


def in_hsv_range(planes: Planes) -> np.ndarray:
    """Pixels within the bounds of the method hsv, (H, W) uint8 of 0 and 1."""
    return cv2.inRange(cv2.cvtColor(cv2.merge(planes), cv2.COLOR_RGB2HSV), *HSV_RANGE) & 1


def chroma_threshold(counts: np.ndarray) -> int:
    """Otsu's threshold of what (256,) int64 counts, held between noise and the chroma that is tissue in any stain."""
    levels = np.arange(256)
    below, total = np.cumsum(counts), counts.sum()
    sums = np.cumsum(counts * levels)
    splits = np.flatnonzero((below > 0) & (below < total))  # thresholds with something on both sides
    if len(splits) == 0:
        return CHROMA_RANGE[1] if total == 0 else CHROMA_RANGE[0]
    share = below[splits] / total
    difference = sums[splits] / below[splits] - (sums[-1] - sums[splits]) / (total - below[splits])
    otsu = splits[np.argmax(share * (1 - share) * difference**2)]  # the variance between the two sides
    return int(np.clip(otsu, *CHROMA_RANGE))


def _clean(tissue: np.ndarray, excluded: np.ndarray | None, mpp: float) -> np.ndarray:
    """Close small gaps, drop specks, fill small holes, in place."""
    if excluded is not None:
        np.greater(tissue, excluded, out=tissue)  # set and not excluded
    close_gaps(tissue, CLOSING_UM / 2 / mpp)
    if excluded is not None:
        np.greater(tissue, excluded, out=tissue)
    drop_small(tissue, MIN_TISSUE_UM2 / mpp**2)
    fill_small(tissue, MAX_HOLE_UM2 / mpp**2)
    return tissue


def _find_mixed(picture: np.ndarray, balance: Balance, glass: tuple[float, float], mpp: float, out: np.ndarray) -> None:
    """Where the Shannon entropy of grey levels in a window is high, into (H, W) uint8 of 0 and 1.

    Levels are binned around that of the glass, in bins that are wide enough for its noise. One box filter a bin counts
    the pixels of each window, and the entropy is a sum of looked-up terms: no histogram per pixel is made.
    """
    height, width = out.shape
    side = min(15, odd(ENTROPY_WINDOW_UM / mpp))  # 15 x 15 pixels still count in 8 bit
    level, noise = glass
    step = max(LEAST_BIN, 5 * noise)
    bins = np.clip(np.round((np.arange(256) - level) / step) + ENTROPY_BINS - 2, 0, ENTROPY_BINS - 1).astype(np.uint8)
    shares = np.arange(256, dtype=np.float32) / side**2
    term = np.where(shares > 0, -shares * np.log2(np.maximum(shares, 1e-9)), 0).astype(np.float32)
    kernel = disc(side / 4)

    def find(rows: slice) -> None:
        wide, inside = widen(rows, side // 2 + len(kernel) // 2, height)
        grey = cv2.cvtColor(balance.smooth(picture, wide), cv2.COLOR_RGB2GRAY)
        binned = cv2.LUT(grey, bins)
        entropy = np.zeros(grey.shape, np.float32)
        for used in np.flatnonzero(histogram(binned)).tolist():
            counts = cv2.boxFilter((binned == used).view(np.uint8), -1, (side, side), normalize=False)
            entropy += cv2.LUT(counts, term)
        mixed = (entropy > ENTROPY_BITS) | (cv2.boxFilter(grey, -1, (3, 3)) < level - 2 * step)
        out[rows] = cv2.erode(mixed.view(np.uint8), kernel)[inside]

    map_strips(find, height, width)


def _glass(counts: np.ndarray, num_px: int) -> tuple[float, float]:
    """Grey level of the glass, the brightest of the frequent ones, and the deviation of its noise.

    Args:
        counts: (256,) int64, how often each grey level occurs among near-neutral pixels.
        num_px: of the picture.
    """
    counts = counts.astype(np.float32)
    counts[:140] = 0
    scanned = counts.copy()
    scanned[PURE_WHITE:] = 0  # what was never scanned is filled with white, and glass beside it is a little darker
    if scanned[PURE_WHITE - 30 :].sum() >= 0.01 * num_px:
        counts = scanned
    smooth = cv2.GaussianBlur(counts[None], (5, 1), 1).ravel()
    peaks = np.flatnonzero(
        (smooth >= np.roll(smooth, 1)) & (smooth > np.roll(smooth, -1)) & (smooth > smooth.max() / 4)
    )
    if len(peaks) == 0:
        return 255.0, 0.0
    level = int(peaks[-1])
    above = counts[level : level + 20]  # tissue is darker: what is brighter than the peak is noise alone
    return float(level), float(np.sqrt((above * np.arange(len(above)) ** 2).sum() / max(above.sum(), 1)))
