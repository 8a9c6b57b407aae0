"""A slide: open it, know its microns per pixel, read any part of it at any mpp.

Positions are always level-0 pixels, (x, y) of a top-left corner. Pictures are (H, W, 3) uint8 RGB arrays. Associated
images (label, macro) may show a patient's name and are never read.
"""

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import openslide
from PIL import Image, UnidentifiedImageError

from stage0_tiling.resample import ON_GRID, on_grid, resize, sample_box
from stage0_tiling.tiff_codecs import TileError
from stage0_tiling.tiled_tiff import TiledTiff

READERS = ("auto", "openslide", "tiff")
# vendors whose levels are plain grids of tiles; those of others overlap, are padded or come in several regions
PLAIN_TIFF = ("aperio", "generic-tiff")
PLAUSIBLE_MPP = (0.05, 20.0)
OBJECTIVE_TIMES_MPP = 10.0  # 10x is 1 um/px by convention: 20x 0.5, 40x 0.25
ISOTROPIC_TOLERANCE = 0.01  # mpp of x and y that differ less are one number, rounded differently
LEVEL_TOLERANCE = 0.02  # a level this much coarser than asked still counts as fine enough
MAX_UPSAMPLING = 4.0
WARN_UPSAMPLING = 1.1
MAX_READ_PX = 2048  # side of one read: bounds memory where a slide has no pyramid
UM_PER_UNIT = {"inch": 25400.0, "centimeter": 10000.0}
BACKGROUND = 255
OVERSAMPLING = 2.0  # least, of what is decoded at reduced size and resampled after

logger = logging.getLogger(__name__)


class SlideError(ValueError):
    """This slide cannot be used; the message says why and what would help."""


@dataclass(frozen=True)
class PixelSize:
    """Microns per level-0 pixel, and where the number comes from.

    Attributes:
        x: um per pixel along x.
        y: um per pixel along y.
        source: `slide`, `objective` or `assumed`.
    """

    x: float
    y: float
    source: str

    @property
    def mpp(self) -> float:
        """One number for both directions, their geometric mean."""
        return math.sqrt(self.x * self.y)


class Slide:
    """An open slide or plain image. Safe to read from several threads.

    Attributes:
        path: the file.
        format: OpenSlide's vendor name (`aperio`, `mirax`, ...), `tiff`, or `image/png` and the like.
        reader: what reads the tiles: `openslide`, `tiff` (our own, faster), or `pillow` for plain images.
        width: level-0 pixels.
        height: level-0 pixels.
        num_levels: of the pyramid.
    """

    def __init__(self, path: str | Path, reader: str = "auto"):
        """Open `path`.

        Args:
            path: a slide or plain image.
            reader: `tiff` for our own reader of tiled JPEG and JPEG 2000 TIFFs, `openslide` to do without it, `auto`
                for the former wherever it can be used. Thumbnails come from OpenSlide in any case.

        Raises:
            SlideError: if it is missing, no slide or image, or not what the reader asked for can read.
        """
        assert reader in READERS
        self.path = Path(path)
        if not self.path.exists():
            raise SlideError(f"{self.path.name} does not exist")
        self._image_dpi: tuple[float | None, float | None] = (None, None)
        self._tiff: TiledTiff | None = None
        self._handle = self._open(reader)
        if reader == "tiff" and self._tiff is None:
            self._handle.close()
            raise SlideError(
                f"{self.path.name} ({self.format}) is no tiled TIFF in JPEG or JPEG 2000 that --reader tiff can read: "
                "use --reader auto"
            )
        self.reader = "tiff" if self._tiff else "pillow" if self.format.startswith("image/") else "openslide"
        self.width, self.height = self._handle.dimensions
        self.num_levels = self._handle.level_count
        self._downsamples = self._handle.level_downsamples

    def _open(self, reader: str) -> openslide.AbstractSlide | TiledTiff:
        """OpenSlide where it knows the format, else our own reader, else Pillow, with the whole image in memory."""
        try:
            slide = openslide.OpenSlide(self.path)
        except openslide.OpenSlideError as error:
            if reader != "openslide" and (tiff := TiledTiff.open(self.path)):
                self.format, self._tiff = "tiff", tiff
                return tiff
            if isinstance(error, openslide.OpenSlideUnsupportedFormatError):
                return self._open_image()
            raise self._unopenable(error) from error
        except OSError as error:
            raise self._unopenable(error) from error
        self.format = slide.properties[openslide.PROPERTY_NAME_VENDOR]
        if reader != "openslide" and self.format in PLAIN_TIFF:
            self._tiff = TiledTiff.open(self.path, slide.level_dimensions)
        return slide

    def _open_image(self) -> openslide.AbstractSlide:
        try:
            with Image.open(self.path) as image:
                self.format = f"image/{(image.format or 'unknown').lower()}"
                self._image_dpi = tuple(_positive(value) for value in image.info.get("dpi", (None, None)))
                return openslide.ImageSlide(_on_white(image))
        except UnidentifiedImageError as error:
            raise SlideError(f"{self.path.name} is no slide or image that OpenSlide or Pillow can open") from error
        except (OSError, Image.DecompressionBombError) as error:
            raise self._unopenable(error) from error

    def _unopenable(self, error: Exception) -> SlideError:
        return SlideError(f"{self.path.name} cannot be opened ({_reason(error)}): is the file whole?")

    def __enter__(self) -> "Slide":
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.close()
        if self._tiff is not None:
            self._tiff.close()

    def pixel_size(self, assume_mpp: float | None = None) -> PixelSize:
        """Microns per pixel: what the slide says, else 10 / objective power, else `assume_mpp`.

        `assume_mpp` also replaces a slide's implausible value, never a plausible one.

        Raises:
            SlideError: if nothing is known, or the value is implausible and nothing is assumed.
        """
        found = self._stated_pixel_size()
        if found is not None and all(PLAUSIBLE_MPP[0] <= value <= PLAUSIBLE_MPP[1] for value in (found.x, found.y)):
            return found
        if assume_mpp is not None:
            return PixelSize(assume_mpp, assume_mpp, "assumed")
        mend = "state the true value with --assume_mpp, e.g. --assume_mpp 0.5 for a 20x scan"
        if found is None:
            raise SlideError(f"{self.path.name} says neither its mpp nor its objective power: {mend}")
        raise SlideError(
            f"{self.path.name} says {found.mpp:.4g} um/px, which is implausible "
            f"(expected {PLAUSIBLE_MPP[0]} to {PLAUSIBLE_MPP[1]:g}): {mend}"
        )

    def read_region(self, x: int, y: int, width: int, height: int, size: tuple[int, int]) -> np.ndarray:
        """Read a rectangle of level 0, resampled by area to `size`.

        Args:
            x: level-0 pixel of the left edge.
            y: level-0 pixel of the top edge.
            width: level-0 pixels.
            height: level-0 pixels; what lies beyond the slide is white.
            size: (width, height) in pixels of the picture.

        Returns:
            (size[1], size[0], 3) uint8 RGB, read from the coarsest level that is still fine enough.
        """
        if self._tiff is not None and (picture := self._read_tiled(x, y, width, height, size)) is not None:
            return picture
        return self._read_plain(x, y, width, height, size)

    def read_whole(self, width: int, height: int) -> np.ndarray:
        """Read the whole slide as (height, width, 3) uint8 RGB, block by block, so that memory stays bounded."""
        scale_x, scale_y = self.width / width, self.height / height
        level = self._level_for(min(scale_x, scale_y))
        step = max(1, int(MAX_READ_PX * self._downsamples[level] / max(scale_x, scale_y)))
        picture = np.empty((height, width, 3), np.uint8)
        for top in range(0, height, step):
            for left in range(0, width, step):
                bottom, right = min(top + step, height), min(left + step, width)
                x0, y0 = round(left * scale_x), round(top * scale_y)
                x1, y1 = round(right * scale_x), round(bottom * scale_y)
                # by the same reader whatever reads the tiles, so that the tissue found on it is the same
                read = self.read_region if self._handle is self._tiff else self._read_plain
                block = read(x0, y0, x1 - x0, y1 - y0, (right - left, bottom - top))
                picture[top:bottom, left:right] = block
        return picture

    def _level_for(self, downsample: float) -> int:
        """The coarsest level that is still fine enough for a downsample of level 0."""
        fine = [level for level, has in enumerate(self._downsamples) if has <= downsample * (1 + LEVEL_TOLERANCE)]
        return max(fine, default=0, key=lambda level: self._downsamples[level])

    def _read_tiled(self, x: int, y: int, width: int, height: int, size: tuple[int, int]) -> np.ndarray | None:
        """Read through our own reader, shrunk while decoding; None where OpenSlide must decide what is not there."""
        level = self._level_for(min(width / size[0], height / size[1]))
        shrink = self._shrink_for(level, (x, y, width, height), size)
        left, top, columns, rows = (value / self._downsamples[level] / shrink for value in (x, y, width, height))
        if shrink == 1:  # whole pixels, and linear between them, as OpenSlide does
            columns, rows = max(1, round(columns)), max(1, round(rows))
        x0, y0 = math.floor(left + ON_GRID), math.floor(top + ON_GRID)
        box = x0, y0, max(x0 + 1, math.ceil(left + columns - ON_GRID)), max(y0 + 1, math.ceil(top + rows - ON_GRID))
        if self._handle is not self._tiff and self._tiff.is_sparse(level, box, shrink):
            return None
        try:
            picture = self._tiff.read(level, box, shrink)
        except (TileError, OSError) as error:
            raise self._unreadable(x, y, level, error) from error
        interpolation = cv2.INTER_LINEAR if shrink == 1 else cv2.INTER_CUBIC
        return sample_box(picture, left - x0, top - y0, columns, rows, size, interpolation)

    def _shrink_for(self, level: int, box: tuple[int, int, int, int], size: tuple[int, int]) -> int:
        """By how much to shrink a level while decoding it.

        Down to the size wanted where the box then fills whole pixels. Else to twice that size at the coarsest: what
        is resampled anyway must be finer than the result, or the picture differs visibly from one shrunk by area.
        """
        edges = [value / self._downsamples[level] for value in (box[0], box[1], box[0] + box[2], box[1] + box[3])]
        ratio = min((edges[2] - edges[0]) / size[0], (edges[3] - edges[1]) / size[1])
        for shrink in sorted(self._tiff.shrinks(level), reverse=True):
            if ratio / shrink < 1 - LEVEL_TOLERANCE:
                continue  # coarser than wanted
            left, top, right, bottom = (edge / shrink for edge in edges)
            fits = on_grid(left, top, right, bottom) and (round(right - left), round(bottom - top)) == size
            if fits or ratio / shrink >= OVERSAMPLING:
                return shrink
        return 1

    def _read_plain(self, x: int, y: int, width: int, height: int, size: tuple[int, int]) -> np.ndarray:
        """Read through OpenSlide or Pillow."""
        level = self._level_for(min(width / size[0], height / size[1]))
        downsample = self._downsamples[level]
        region = max(1, round(width / downsample)), max(1, round(height / downsample))
        try:
            rgba = np.asarray(self._handle.read_region((x, y), level, region))
        except (openslide.OpenSlideError, OSError, Image.DecompressionBombError) as error:
            raise self._unreadable(x, y, level, error) from error
        rgb = np.ascontiguousarray(rgba[..., :3])
        outside = rgba[..., 3] == 0  # beyond the slide, or never scanned (MRXS)
        if outside.any():
            rgb[outside] = BACKGROUND
        return resize(rgb, size)

    def _unreadable(self, x: int, y: int, level: int, error: Exception) -> SlideError:
        return SlideError(f"{self.path.name} cannot be read at ({x}, {y}), level {level} ({_reason(error)})")

    def _stated_pixel_size(self) -> PixelSize | None:
        properties = self._handle.properties
        x = _positive(properties.get(openslide.PROPERTY_NAME_MPP_X))
        y = _positive(properties.get(openslide.PROPERTY_NAME_MPP_Y))
        if not (x or y):
            unit = UM_PER_UNIT.get(properties.get("tiff.ResolutionUnit", ""))
            per_x, per_y = (_positive(properties.get(f"tiff.{axis}Resolution")) for axis in "XY")
            if unit and (per_x or per_y):
                x, y = (unit / value if value else None for value in (per_x, per_y))
        if not (x or y):
            x, y = (UM_PER_UNIT["inch"] / dpi if dpi else None for dpi in self._image_dpi)
        if x or y:
            x, y = x or y, y or x
            if abs(x / y - 1) <= ISOTROPIC_TOLERANCE:
                x = y = math.sqrt(x * y)
            return PixelSize(x, y, "slide")
        power = _positive(properties.get(openslide.PROPERTY_NAME_OBJECTIVE_POWER))
        return PixelSize(*(OBJECTIVE_TIMES_MPP / power,) * 2, "objective") if power else None


def check_resolution(name: str, pixel_size: PixelSize, mpp: float) -> None:
    """Refuse to invent detail: warn where tiles are enlarged, fail where by more than 4 times.

    Raises:
        SlideError: if the slide is more than 4 times coarser than `mpp`.
    """
    enlargement = pixel_size.mpp / mpp
    if enlargement > MAX_UPSAMPLING:
        raise SlideError(
            f"{name} has {pixel_size.mpp:.4g} um/px, {enlargement:.1f} times coarser than --mpp {mpp:g} "
            f"(at most {MAX_UPSAMPLING:g}): ask for a coarser --mpp"
        )
    if enlargement > WARN_UPSAMPLING:
        logger.warning(
            "%s has %.4g um/px, coarser than --mpp %g: its tiles are enlarged %.2f times",
            name,
            pixel_size.mpp,
            mpp,
            enlargement,
        )


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (BACKGROUND,) * 4), image).convert("RGB")


def _positive(text: object) -> float | None:
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) and value > 0 else None


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
