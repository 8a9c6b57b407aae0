"""Tissue and artefacts on whole pictures, as their recipes read: what strips, threads and histograms must equal."""

import cv2
import numpy as np

from stage0_tiling import artefacts as how
from stage0_tiling import tissue_methods as tissue
from stage0_tiling.white_balance import LEAST_GLASS, MEDIAN_UM, TINT, odd


def plain_mask(picture: np.ndarray, mpp: float, method: str = "otsu") -> np.ndarray:
    smooth = cv2.medianBlur(picture, odd(MEDIAN_UM / mpp))
    balanced = plain_white_balance(smooth)
    brightest, darkest = plain_extremes(balanced)
    chroma = brightest - darkest
    excluded = plain_grow(
        plain_dark(balanced) | plain_marker_ink(balanced),
        tissue.INK_MARGIN_UM / mpp,
        only_large_px=tissue.MIN_INK_UM2 / mpp**2,
    )
    if method == "otsu":
        found = chroma > plain_threshold(chroma[~excluded])
    elif method == "hsv":
        found = cv2.inRange(cv2.cvtColor(balanced, cv2.COLOR_RGB2HSV), *tissue.HSV_RANGE) > 0
    else:
        found = plain_mixed(cv2.cvtColor(smooth, cv2.COLOR_RGB2GRAY), chroma, mpp)
    found &= ~excluded
    kernel = plain_disc(tissue.CLOSING_UM / 2 / mpp)
    found = cv2.morphologyEx(found.astype(np.uint8), cv2.MORPH_CLOSE, kernel).astype(bool)
    found = plain_without_small(found & ~excluded, tissue.MIN_TISSUE_UM2 / mpp**2)
    return ~plain_without_small(~found, tissue.MAX_HOLE_UM2 / mpp**2)


def plain_white_balance(picture: np.ndarray) -> np.ndarray:
    brightest, darkest = plain_extremes(picture)
    candidates = (brightest - darkest <= TINT) & (brightest > 140)
    if np.count_nonzero(candidates) < LEAST_GLASS * brightest.size:
        return picture
    level = int(np.bincount(brightest[candidates], minlength=256).argmax())
    background = np.median(picture[candidates & (brightest >= level - 4) & (brightest <= level + 4)], axis=0)
    balanced = np.clip(np.arange(256)[:, None] * (255.0 / background), 0, 255).astype(np.uint8)
    return cv2.LUT(picture, balanced[None])


def plain_extremes(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return picture.max(axis=2), picture.min(axis=2)


def plain_dark(picture: np.ndarray) -> np.ndarray:
    brightest, darkest = plain_extremes(picture)
    return (brightest < tissue.DARK) & (brightest - darkest < tissue.NEUTRAL)


def plain_marker_ink(picture: np.ndarray) -> np.ndarray:
    hue, saturation, value = cv2.split(cv2.cvtColor(picture, cv2.COLOR_RGB2HSV))
    yellow = (hue > 24) & (hue <= 35) & (saturation > 150)
    green = (hue > 35) & (hue <= 90) & (saturation > 60)
    blue = (hue > 90) & (hue <= 124) & (saturation > 130)
    red = ((hue <= 5) | (hue >= 174)) & (saturation > 190) & (value > 110)
    return yellow | green | blue | red


def plain_threshold(chroma: np.ndarray) -> float:
    if chroma.size == 0:
        return tissue.CHROMA_RANGE[1]
    otsu, _ = cv2.threshold(chroma.reshape(-1, 1), 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    return float(np.clip(otsu, *tissue.CHROMA_RANGE))


def plain_mixed(grey: np.ndarray, chroma: np.ndarray, mpp: float) -> np.ndarray:
    """Entropy of the grey levels in a window, each of which is a mean of what is there of one bin."""
    side = min(15, odd(tissue.ENTROPY_WINDOW_UM / mpp))
    counts = np.bincount(grey[chroma <= tissue.GLASS_TINT], minlength=256)
    glass, noise = tissue._glass(counts, grey.size)
    width = max(tissue.LEAST_BIN, 5 * noise)
    bins = np.round((np.arange(256) - glass) / width) + tissue.ENTROPY_BINS - 2
    binned = np.clip(bins, 0, tissue.ENTROPY_BINS - 1)[grey]
    entropy = np.zeros(grey.shape)
    for level in np.unique(binned):
        share = cv2.boxFilter((binned == level).astype(np.float64), -1, (side, side))
        entropy -= share * np.log2(np.maximum(share, 1e-9))
    mixed = (entropy > tissue.ENTROPY_BITS) | (cv2.boxFilter(grey, -1, (3, 3)) < glass - 2 * width)
    return cv2.erode(mixed.astype(np.uint8), plain_disc(side / 4)).astype(bool)


def plain_grow(mask: np.ndarray, radius_px: float, only_large_px: float) -> np.ndarray:
    large = plain_without_small(mask, only_large_px)
    return cv2.dilate(large.astype(np.uint8), plain_disc(radius_px)).astype(bool)


def plain_disc(radius_px: float) -> np.ndarray:
    side = 2 * max(1, round(radius_px)) + 1
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))


def plain_without_small(mask: np.ndarray, min_px: float) -> np.ndarray:
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    keep = stats[:, cv2.CC_STAT_AREA] >= min_px
    keep[0] = False
    return keep[labels]


def plain_artefacts(picture: np.ndarray, mask: np.ndarray, mpp: float) -> dict[str, np.ndarray]:
    balanced = plain_white_balance(cv2.medianBlur(picture, odd(MEDIAN_UM / mpp)))
    dark = plain_dark(balanced)
    bands = plain_border_bands(dark)
    ink = plain_marker_ink(balanced) | (dark & ~bands)
    pen = plain_grow(ink, how.INK_MARGIN_UM / mpp, only_large_px=how.MIN_INK_UM2 / mpp**2)
    bands = plain_grow(bands, how.EDGE_MARGIN_UM / mpp, only_large_px=0)
    edge = bands | plain_grow(plain_lines(balanced, bands | pen, mpp), how.EDGE_MARGIN_UM / mpp, only_large_px=0)
    return {"pen": pen, "fold": plain_folds(balanced, mask & ~pen & ~edge, mpp), "edge": edge}


def plain_border_bands(dark: np.ndarray) -> np.ndarray:
    _, labels = cv2.connectedComponents(dark.astype(np.uint8), connectivity=8)
    bands = set(labels[[0, 0, -1, -1], [0, -1, 0, -1]].tolist())
    for side in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
        bands |= set(np.flatnonzero(np.bincount(side) >= how.BAND_SHARE * len(side)).tolist())
    return np.isin(labels, list(bands - {0}))


def plain_lines(balanced: np.ndarray, other: np.ndarray, mpp: float) -> np.ndarray:
    brightest, darkest = plain_extremes(balanced)
    side = 2 * max(1, round(how.LINE_WIDTH_UM / mpp)) + 1
    valleys = cv2.morphologyEx(darkest, cv2.MORPH_BLACKHAT, np.ones((side, side), np.uint8))
    candidates = (valleys > how.LINE_DEPTH) & (brightest - darkest < how.LINE_TINT) & ~other
    lines = np.zeros(candidates.shape, np.uint8)
    contours, _ = cv2.findContours(candidates.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    for contour in contours:
        sides = sorted(cv2.minAreaRect(contour)[1])
        is_thin = max(1.0, sides[0]) * mpp <= how.LINE_WIDTH_UM and sides[1] >= how.LINE_ASPECT * max(1.0, sides[0])
        if is_thin and sides[1] >= how.LINE_SHARE * min(candidates.shape):
            cv2.drawContours(lines, [contour], -1, 1, -1)
    return lines > 0


def plain_folds(balanced: np.ndarray, mask: np.ndarray, mpp: float) -> np.ndarray:
    _, saturation, value = cv2.split(cv2.cvtColor(balanced, cv2.COLOR_RGB2HSV))
    weight = mask.astype(np.float32)
    difference = (saturation.astype(np.float32) - value) / 255 * weight
    sigma = how.FOLD_SMOOTHING_UM / mpp
    smooth = cv2.GaussianBlur(difference, (0, 0), sigma) / np.maximum(cv2.GaussianBlur(weight, (0, 0), sigma), 1e-3)
    some = smooth[mask][:: how.STATISTICS_STEP]
    median = np.median(some)
    deviation = 1.4826 * np.median(np.abs(some - median))
    rim, core = (mask & (smooth > median + max(least, times * deviation)) for least, times in how.FOLD_RISE)
    rim = plain_without_small(rim, how.MIN_FOLD_UM2 / mpp**2)
    _, labels = cv2.connectedComponents(rim.astype(np.uint8), connectivity=8)
    return np.isin(labels, np.unique(labels[core & rim])) & rim
