"""Which pixels of a thumbnail are tissue, by three recipes.

otsu     A threshold on chroma found by Otsu's method (Otsu 1979; the use on slides e.g. Lu et al. 2021, CLAM), with
         what experience asks for: white balance first, so that grey and tinted backgrounds are neutral, and bounds on
         the threshold, so that faint tissue beside dark tissue is kept and an empty slide stays empty.
hsv      Fixed bounds on hue, saturation and value, those by which training tiles of pathology foundation models were
         chosen (Karasikov et al. 2025, arXiv:2504.05186): the same on every slide, for H&E of common scanners.
entropy  Where grey levels are mixed (after EntropyMasker, Song et al. 2023, doi:10.1038/s41598-023-29638-1) or well
         below those of the glass: colour does not matter, so unstained, pale and immunostained tissue is found.

In all of them dark neutral pixels (scanner borders, black ink) and marker ink are no tissue, and clean-up is in um².
"""

import math

import cv2
import numpy as np

METHODS = ("otsu", "hsv", "entropy")
DARK = 70  # brightest channel of scanner borders and black ink
NEUTRAL = 40  # largest chroma of what counts as grey
TINT = 30  # largest chroma of a background
CHROMA_RANGE = (7, 12)  # bounds of the threshold: below is JPEG noise, above is tissue in any stain
HSV_RANGE = ((90, 8, 103), (180, 255, 255))  # hue in 2 degrees, as OpenCV has it
MEDIAN_UM = 20.0
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
    smooth = cv2.medianBlur(picture, _odd(MEDIAN_UM / mpp))
    balanced = _white_balance(smooth)
    brightest, darkest = extremes(balanced)
    chroma = brightest - darkest
    dark = _is_dark(brightest, chroma)
    excluded = grow(dark | marker_ink(balanced), INK_MARGIN_UM / mpp, only_large_px=MIN_INK_UM2 / mpp**2)
    if method == "otsu":
        found = chroma > _threshold(chroma[~excluded] if excluded.any() else chroma)
    elif method == "hsv":
        found = cv2.inRange(cv2.cvtColor(balanced, cv2.COLOR_RGB2HSV), *HSV_RANGE).view(bool)
    else:
        found = _is_mixed(cv2.cvtColor(smooth, cv2.COLOR_RGB2GRAY), chroma, mpp)
    return _clean(found & ~excluded, excluded, mpp)


def balanced_picture(picture: np.ndarray, mpp: float) -> np.ndarray:
    """Smooth a thumbnail and scale its channels so that the glass is white, (H, W, 3) uint8."""
    return _white_balance(cv2.medianBlur(picture, _odd(MEDIAN_UM / mpp)))


def dark_pixels(balanced: np.ndarray) -> np.ndarray:
    """Dark neutral pixels, (H, W) bool: black ink, and what the scanner left black."""
    brightest, darkest = extremes(balanced)
    return _is_dark(brightest, brightest - darkest)


def _is_dark(brightest: np.ndarray, chroma: np.ndarray) -> np.ndarray:
    return (brightest < DARK) & (chroma < NEUTRAL)


def _clean(tissue: np.ndarray, excluded: np.ndarray, mpp: float) -> np.ndarray:
    """Close small gaps, drop specks, fill small holes."""
    closed = cv2.morphologyEx(tissue.view(np.uint8), cv2.MORPH_CLOSE, disc(CLOSING_UM / 2 / mpp)).view(bool)
    tissue = without_small(closed & ~excluded, MIN_TISSUE_UM2 / mpp**2)
    return ~without_small(~tissue, MAX_HOLE_UM2 / mpp**2)


def _is_mixed(grey: np.ndarray, chroma: np.ndarray, mpp: float) -> np.ndarray:
    """Where the Shannon entropy of grey levels in a window is high, (H, W) bool.

    Levels are binned around that of the glass, in bins that are wide enough for its noise. One box filter a bin counts
    the pixels of each window, and the entropy is a sum of looked-up terms: no histogram per pixel is made.
    """
    side = min(15, _odd(ENTROPY_WINDOW_UM / mpp))  # 15 x 15 pixels still count in 8 bit
    glass, noise = _glass(grey, chroma)
    width = max(LEAST_BIN, 5 * noise)
    bins = np.clip(np.round((np.arange(256) - glass) / width) + ENTROPY_BINS - 2, 0, ENTROPY_BINS - 1).astype(np.uint8)
    binned = cv2.LUT(grey, bins)
    shares = np.arange(256, dtype=np.float32) / side**2
    term = np.where(shares > 0, -shares * np.log2(np.maximum(shares, 1e-9)), 0).astype(np.float32)
    entropy = np.zeros(grey.shape, np.float32)
    for level in np.flatnonzero(cv2.calcHist([binned], [0], None, [256], [0, 256])):
        counts = cv2.boxFilter((binned == level).view(np.uint8), -1, (side, side), normalize=False)
        entropy += cv2.LUT(counts, term)
    mixed = (entropy > ENTROPY_BITS) | (cv2.boxFilter(grey, -1, (3, 3)) < glass - 2 * width)
    return cv2.erode(mixed.view(np.uint8), disc(side / 4)).view(bool)


def _glass(grey: np.ndarray, chroma: np.ndarray) -> tuple[float, float]:
    """Grey level of the glass, the brightest of the frequent neutral ones, and the deviation of its noise."""
    histogram = cv2.calcHist([grey], [0], (chroma <= GLASS_TINT).view(np.uint8), [256], [0, 256]).ravel()
    histogram[:140] = 0
    scanned = histogram.copy()
    scanned[PURE_WHITE:] = 0  # what was never scanned is filled with white, and glass beside it is a little darker
    if scanned[PURE_WHITE - 30 :].sum() >= 0.01 * grey.size:
        histogram = scanned
    smooth = cv2.GaussianBlur(histogram[None], (5, 1), 1).ravel()
    peaks = np.flatnonzero(
        (smooth >= np.roll(smooth, 1)) & (smooth > np.roll(smooth, -1)) & (smooth > smooth.max() / 4)
    )
    if len(peaks) == 0:
        return 255.0, 0.0
    level = int(peaks[-1])
    above = histogram[level : level + 20]  # tissue is darker: what is brighter than the peak is noise alone
    return float(level), float(np.sqrt((above * np.arange(len(above)) ** 2).sum() / max(above.sum(), 1)))


def _white_balance(picture: np.ndarray) -> np.ndarray:
    """Scale channels so that the background is white; a picture without a bright, near-neutral one stays as it is."""
    brightest, darkest = extremes(picture)
    candidates = ((brightest - darkest <= TINT) & (brightest > 140)).view(np.uint8)
    if cv2.countNonZero(candidates) < 0.005 * brightest.size:
        return picture
    level = int(_histogram(brightest, candidates).argmax())
    near = candidates & (brightest >= level - 4) & (brightest <= level + 4)
    channels = cv2.split(picture)
    background = [_median(_histogram(channel, near)) for channel in channels]
    return cv2.merge(
        [cv2.LUT(channel, _gain(255.0 / level)) for channel, level in zip(channels, background, strict=True)]
    )


def _gain(factor: float) -> np.ndarray:
    return np.clip(np.arange(256) * factor, 0, 255).astype(np.uint8)


def _histogram(channel: np.ndarray, where: np.ndarray) -> np.ndarray:
    return cv2.calcHist([channel], [0], where, [256], [0, 256]).ravel()


def _median(histogram: np.ndarray) -> float:
    """Median of the values that a histogram counts; the mean of the middle two where they are even in number."""
    up_to = np.cumsum(histogram.astype(np.int64))
    middle = (up_to[-1] - 1) // 2, up_to[-1] // 2
    return float(np.searchsorted(up_to, middle, side="right").mean())


def extremes(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Brightest and darkest channel of each pixel; channel by channel, which is ten times as fast as along an axis."""
    red, green, blue = cv2.split(picture)
    return cv2.max(cv2.max(red, green), blue), cv2.min(cv2.min(red, green), blue)


def marker_ink(picture: np.ndarray) -> np.ndarray:
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


def grow(mask: np.ndarray, radius_px: float, only_large_px: float) -> np.ndarray:
    """Widen the connected groups of (H, W) bool that have at least so many pixels, and drop the others."""
    large = without_small(mask, only_large_px)
    if not large.any():
        return large
    return cv2.dilate(large.view(np.uint8), disc(radius_px)).view(bool)


def without_small(mask: np.ndarray, min_px: float) -> np.ndarray:
    """Drop the connected groups of less than `min_px` pixels from (H, W) bool."""
    if cv2.countNonZero(mask.view(np.uint8)) < min_px:
        return np.zeros_like(mask)
    count, labels = cv2.connectedComponents(mask.view(np.uint8), connectivity=8)
    if count <= 2:  # the background, and one group at most, which is large as its pixels were counted above
        return mask
    keep = np.bincount(labels.ravel(), minlength=count) >= min_px
    keep[0] = False
    return mask if keep[1:].all() else np.take(keep, labels)


def disc(radius_px: float) -> np.ndarray:
    """Kernel of a disc for morphology."""
    side = 2 * max(1, round(radius_px)) + 1
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))


def _odd(size: float) -> int:
    return max(3, 2 * math.floor(size / 2) + 1)
