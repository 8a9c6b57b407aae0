"""Small slides for tests: pyramidal, tiled JPEG TIFFs with mpp, drawn from a seed, with the exact mask of tissue."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import imagecodecs
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


def write_pyramid(path: Path, picture: np.ndarray, mpp: float | None, num_levels: int = 3, **how: object) -> None:
    """Write (H, W, 3) uint8 RGB as a pyramidal, tiled JPEG TIFF, which OpenSlide opens; `how` as in `TiffForm`."""
    form = TiffForm(**how)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tifffile.TiffWriter(path) as tiff:
        for level in range(num_levels):
            where = {}
            if mpp is not None:
                where = {"resolution": (1e4 / mpp / form.step**level,) * 2, "resolutionunit": "CENTIMETER"}
            if form.aperio:
                text = f"Aperio Image Library\r\n{picture.shape[1]}x{picture.shape[0]}|AppMag = 20|MPP = {mpp}"
                where |= {"description": text, "metadata": None}
            reduced = int(level > 0 and not form.aperio)
            form.write(tiff, picture, subfiletype=reduced, photometric="rgb", tile=(form.tile, form.tile), **where)
            size = picture.shape[1] // form.step, picture.shape[0] // form.step
            picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)


@dataclass(frozen=True)
class TiffForm:
    """How the tiles of a TIFF are written.

    Attributes:
        tile: side of a tile in pixels.
        step: a level is this many times smaller than the one before.
        colors: `ycbcr` or `rgb`, the components within the JPEG and the photometric tag.
        subsampling: of the chroma: (1, 1) is 4:4:4, (2, 2) is 4:2:0.
        compression: `jpeg`, or one of `aperio_jp2000_rgb`, `aperio_jp2000_ycbc` and `jpeg2000`, without loss.
        shared_tables: abbreviated JPEGs, with their tables in the tag JPEGTables, as Aperio writes them.
        aperio: with the description that makes it an SVS.
    """

    tile: int = 256
    step: int = 2
    colors: str = "ycbcr"
    subsampling: tuple[int, int] = (2, 2)
    compression: str = "jpeg"
    shared_tables: bool = False
    aperio: bool = False

    def write(self, tiff: tifffile.TiffWriter, picture: np.ndarray, **settings: object) -> None:
        if self.compression == "jpeg" and not self.shared_tables:
            args = {"level": 92, "outcolorspace": self.colors}
            subsampling = self.subsampling if self.colors == "ycbcr" else None
            tiff.write(picture, compression="jpeg", compressionargs=args, subsampling=subsampling, **settings)
            return
        tiles = [self._encode(tile) for tile in _tiles(picture, self.tile)]
        tables = {}
        if self.shared_tables:
            split = [split_jpeg(tile) for tile in tiles]
            assert len({tables for tables, _ in split}) == 1
            tables, tiles = {"jpegtables": split[0][0]}, [tile for _, tile in split]
            settings["photometric"] = self.colors
            if self.colors == "ycbcr":
                settings["subsampling"] = self.subsampling
        tiff.write(iter(tiles), shape=picture.shape, dtype=np.uint8, compression=self.compression, **tables, **settings)

    def _encode(self, tile: np.ndarray) -> bytes:
        if self.compression == "aperio_jp2000_ycbc":
            ycbcr = np.ascontiguousarray(cv2.cvtColor(tile, cv2.COLOR_RGB2YCrCb)[..., [0, 2, 1]])
            return imagecodecs.jpeg2k_encode(ycbcr, codecformat="j2k", reversible=True, level=0, mct=False)
        if self.compression != "jpeg":
            return imagecodecs.jpeg2k_encode(tile, codecformat="j2k", reversible=True, level=0)
        return imagecodecs.jpeg8_encode(
            tile, level=92, colorspace="rgb", outcolorspace=self.colors, subsampling=self.subsampling, optimize=False
        )


def split_jpeg(jpeg: bytes) -> tuple[bytes, bytes]:
    """Cut a JPEG into its tables and an abbreviated stream without them."""
    tables, rest, at = b"", b"", 2
    while jpeg[at + 1] != 0xDA:  # start of scan
        end = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
        if jpeg[at + 1] in (0xDB, 0xC4):  # tables of quantisation and of Huffman codes
            tables += jpeg[at:end]
        elif not 0xE0 <= jpeg[at + 1] <= 0xEF:
            rest += jpeg[at:end]
        at = end
    return b"\xff\xd8" + tables + b"\xff\xd9", b"\xff\xd8" + rest + jpeg[at:]


def _tiles(picture: np.ndarray, side: int) -> Iterator[np.ndarray]:
    height, width = picture.shape[:2]
    padded = np.pad(picture, ((0, -height % side), (0, -width % side), (0, 0)), mode="edge")
    for y in range(0, height, side):
        for x in range(0, width, side):
            yield np.ascontiguousarray(padded[y : y + side, x : x + side])
