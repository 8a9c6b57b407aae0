"""Small slides for tests: pyramidal, tiled JPEG TIFFs with mpp, drawn from a seed, with the exact mask of tissue."""

from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import tifffile

PINK, PALE_PINK, PURPLE = (216, 140, 186), (238, 224, 234), (96, 60, 140)
INKS = {"blue": (40, 60, 170), "green": (30, 130, 70), "black": (25, 25, 28), "red": (215, 25, 40)}


@dataclass(frozen=True)
class DrawnSlide:
    """A slide that a test draws.

    Attributes:
        width: level-0 pixels.
        height: level-0 pixels.
        mpp: um per pixel, written into the file; None writes none.
        num_levels: levels of the pyramid, each half of the one before.
        background: RGB.
        stain: RGB of the tissue between nuclei.
        pen: name of an ink that is drawn across a corner, None for no pen.
        black_border: level-0 pixels at the left that a scanner left black.
        pieces: ellipses of tissue, (x, y, radius x, radius y, angle) as fractions of the slide's shorter side.
        seed: of the nuclei and the noise.
    """

    width: int = 2048
    height: int = 1536
    mpp: float | None = 0.5
    num_levels: int = 3
    background: tuple[int, int, int] = (243, 242, 244)
    stain: tuple[int, int, int] = PINK
    pen: str | None = None
    black_border: int = 0
    pieces: tuple[tuple[float, ...], ...] = field(default=((0.45, 0.4, 0.3, 0.2, 20), (0.95, 0.65, 0.22, 0.28, 70)))
    seed: int = 0

    def draw(self) -> tuple[np.ndarray, np.ndarray]:
        """Draw (H, W, 3) uint8 RGB and the exact (H, W) bool mask of the tissue."""
        rng = np.random.default_rng(self.seed)
        picture = np.full((self.height, self.width, 3), self.background, np.uint8)
        mask = np.zeros((self.height, self.width), np.uint8)
        side = min(self.width, self.height)
        for x, y, radius_x, radius_y, angle in self.pieces:
            centre, radii = (int(x * side), int(y * side)), (int(radius_x * side), int(radius_y * side))
            cv2.ellipse(mask, centre, radii, angle, 0, 360, 1, -1)
        picture[mask > 0] = self.stain
        rows, columns = np.nonzero(mask)
        nucleus = tuple(int(0.5 * (a + b)) for a, b in zip(PURPLE, self.stain, strict=True))
        for index in rng.choice(len(rows), min(len(rows), self.width * self.height // 1500), replace=False):
            cv2.circle(picture, (int(columns[index]), int(rows[index])), int(rng.integers(3, 7)), nucleus, -1)
        picture[mask == 0] = self.background
        if self.pen:
            cv2.line(picture, (side // 10, side), (side // 2, int(0.85 * side)), INKS[self.pen], side // 16)
        picture[:, : self.black_border] = 8
        mask[:, : self.black_border] = 0
        noise = rng.normal(0, 2, picture.shape)
        return np.clip(picture + noise, 0, 255).astype(np.uint8), mask.astype(bool)

    def write(self, path: Path) -> np.ndarray:
        """Write the slide and return the exact (H, W) bool mask of its tissue."""
        picture, mask = self.draw()
        write_pyramid(path, picture, self.mpp, self.num_levels)
        return mask


def write_pyramid(path: Path, picture: np.ndarray, mpp: float | None, num_levels: int = 3) -> None:
    """Write (H, W, 3) uint8 RGB as a pyramidal, tiled JPEG TIFF, which OpenSlide opens."""
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = {"tile": (256, 256), "photometric": "rgb", "compression": "jpeg", "compressionargs": {"level": 92}}
    with tifffile.TiffWriter(path) as tiff:
        for level in range(num_levels):
            where = {}
            if mpp is not None:
                where = {"resolution": (1e4 / mpp / 2**level,) * 2, "resolutionunit": "CENTIMETER"}
            tiff.write(picture, subfiletype=int(level > 0), **settings, **where)
            size = picture.shape[1] // 2, picture.shape[0] // 2
            picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
