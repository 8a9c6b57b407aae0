"""The glass of a slide made white: a thumbnail smoothed and its channels scaled, strip by strip."""

import math
from dataclasses import dataclass

import cv2
import numpy as np

from stage0_tiling.strips import map_strips, widen

MEDIAN_UM = 20.0
TINT = 30  # largest chroma of a background
LEAST_GLASS = 0.005  # of a picture; with less that is bright and near neutral it stays as it is
GLASS_MARGIN = 4  # grey levels around the most frequent one that are glass
SAMPLE_PX = 2**19  # of a larger picture so many pixels, of rows at equal distance, tell the colour of the glass

Planes = list[np.ndarray]


@dataclass(frozen=True)
class Balance:
    """How a picture is smoothed and balanced.

    Attributes:
        kernel: side of the median filter in pixels.
        gains: (3, 256) uint8, what each level of red, green and blue becomes; None leaves them.
    """

    kernel: int
    gains: np.ndarray | None = None

    def smooth(self, picture: np.ndarray, rows: slice) -> np.ndarray:
        """Some rows of (H, W, 3) uint8 without noise."""
        wide, inside = widen(rows, self.kernel // 2, len(picture))
        return cv2.medianBlur(picture[wide], self.kernel)[inside]

    def planes(self, picture: np.ndarray, rows: slice) -> Planes:
        """Some rows of (H, W, 3) uint8 without noise, and with white glass: red, green and blue."""
        planes = cv2.split(self.smooth(picture, rows))
        if self.gains is None:
            return list(planes)
        return [cv2.LUT(plane, gain) for plane, gain in zip(planes, self.gains, strict=True)]


def find_balance(picture: np.ndarray, mpp: float) -> Balance:
    """Find the colour of the glass in (H, W, 3) uint8 RGB of `mpp` um/px; a picture without any stays as it is."""
    plain = Balance(odd(MEDIAN_UM / mpp))
    picture = picture[:: max(1, picture.shape[0] * picture.shape[1] // SAMPLE_PX)]
    height, width = picture.shape[:2]

    def levels(rows: slice) -> np.ndarray:
        brightest, candidates = _candidates(plain.planes(picture, rows))
        return histogram(brightest, candidates)

    counts = sum(map_strips(levels, height, width))
    if counts.sum() < LEAST_GLASS * height * width:
        return plain
    level = int(counts.argmax())

    def colours(rows: slice) -> np.ndarray:
        planes = plain.planes(picture, rows)
        brightest, glass = _candidates(planes)
        glass &= cv2.inRange(brightest, level - GLASS_MARGIN, level + GLASS_MARGIN)
        return np.stack([histogram(plane, glass) for plane in planes])

    colour = [_median(counts) for counts in sum(map_strips(colours, height, width))]
    gains = [np.clip(np.arange(256) * (255.0 / level), 0, 255).astype(np.uint8) for level in colour]
    return Balance(plain.kernel, np.stack(gains))


def extremes(planes: Planes) -> tuple[np.ndarray, np.ndarray]:
    """Brightest and darkest channel of each pixel; channel by channel, which is ten times as fast as along an axis."""
    red, green, blue = planes
    return cv2.max(cv2.max(red, green), blue), cv2.min(cv2.min(red, green), blue)


def histogram(values: np.ndarray, where: np.ndarray | None = None) -> np.ndarray:
    """How often each level of (H, W) uint8 occurs, (256,) int64; where a mask is not 0, if there is one."""
    return cv2.calcHist([values], [0], where, [256], [0, 256]).ravel().astype(np.int64)


def _candidates(planes: Planes) -> tuple[np.ndarray, np.ndarray]:
    """Brightest channel, and which pixels are bright and near neutral enough for glass, both (H, W) uint8."""
    brightest, darkest = extremes(planes)
    is_neutral = brightest - darkest <= TINT
    is_neutral &= brightest > 140
    return brightest, is_neutral.view(np.uint8)


def _median(counts: np.ndarray) -> float:
    """Median of the values that a histogram counts; the mean of the middle two where they are even in number."""
    up_to = np.cumsum(counts)
    middle = (up_to[-1] - 1) // 2, up_to[-1] // 2
    return float(np.searchsorted(up_to, middle, side="right").mean())


def odd(size: float) -> int:
    """The odd number of at least 3 that is at most 1 more than a size."""
    return max(3, 2 * math.floor(size / 2) + 1)
