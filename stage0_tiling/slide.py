"""A slide: open it, know its microns per pixel, read any part of it at any mpp.

Positions are always level-0 pixels, (x, y) of a top-left corner. Pictures are (H, W, 3) uint8 RGB arrays. Associated
images (label, macro) may show a patient's name and are never read.
"""

import logging
import math
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import openslide
from PIL import Image

from command_line import first_line
from stage0_tiling.icc import ToSrgb, to_srgb
from stage0_tiling.pixel_size import PixelSize, SlideError, choose_pixel_size, positive, stated_pixel_size
from stage0_tiling.resample import ON_GRID, on_grid, resize, sample_box
from stage0_tiling.slide_opening import BACKGROUND, READERS, open_file
from stage0_tiling.strips import strips
from stage0_tiling.tiff_codecs import TileError

BOUNDS = (
    openslide.PROPERTY_NAME_BOUNDS_X,
    openslide.PROPERTY_NAME_BOUNDS_Y,
    openslide.PROPERTY_NAME_BOUNDS_WIDTH,
    openslide.PROPERTY_NAME_BOUNDS_HEIGHT,
)
LEVEL_TOLERANCE = 0.02  # a level this much coarser than asked still counts as fine enough
MAX_READ_PX = 4096  # side of what is read of a level at once: bounds memory where a slide has no pyramid
MAX_READ_ROWS = 256  # the same for rows, where that many can be read to the bit as all together
THUMBNAIL_THREADS = min(4, os.cpu_count() or 1)
OVERSAMPLING = 2.0  # least, of what is decoded at reduced size and resampled after

Block = tuple[int, int, int, int, tuple[slice, slice]]

logger = logging.getLogger(__name__)


class Slide:
    """An open slide or plain image. Safe to read from several threads.

    Attributes:
        path: the file.
        format: OpenSlide's vendor name (`aperio`, `mirax`, ...), `tiff`, or `image/png` and the like.
        reader: what reads the tiles: `openslide`, `tiff` (our own, faster), or `pillow` for plain images.
        width: level-0 pixels.
        height: level-0 pixels.
        num_levels: of the pyramid.
        bounds: (x, y, width, height) in level-0 pixels of what was scanned, the whole slide where the file does not
            say. A MIRAX slide is mostly empty around it. `read_whole` shows what lies outside as white.
        icc_profile: the ICC profile that the file carries, None if it has none.
        objective: power of the objective that the file states, None if it states none.
    """

    def __init__(self, path: str | Path, reader: str = "auto", *, icc: bool = False, mpp: float | None = None):
        """Open `path`.

        Args:
            path: a slide or plain image.
            reader: `tiff` for our own reader of tiled JPEG and JPEG 2000 TIFFs, `openslide` to do without it, `auto`
                for the former wherever it can be used.
            icc: convert pixels to sRGB by the slide's ICC profile; a slide without one stays as it is.
            mpp: um per level-0 pixel to use whatever the slide states; None believes the slide.

        Raises:
            SlideError: if it is missing, no slide or image, or not what the reader asked for can read, or if its ICC
                profile is wanted and cannot be used.
        """
        assert reader in READERS
        self.path = Path(path)
        self._mpp = mpp
        self._file = open_file(self.path, reader)
        self._handle, self._tiff, self.format = self._file.handle, self._file.tiff, self._file.format
        self.icc_profile = self._file.icc_profile
        if reader == "tiff" and self._tiff is None:
            self._file.close()
            raise SlideError(
                f"{self.path.name} ({self.format}) is no tiled TIFF in JPEG or JPEG 2000 that --reader tiff can read: "
                "use --reader auto"
            )
        self.reader = "tiff" if self._tiff else "pillow" if self.format.startswith("image/") else "openslide"
        self.width, self.height = self._handle.dimensions
        self.num_levels = self._handle.level_count
        self._downsamples = self._handle.level_downsamples
        self.objective = positive(self.properties.get(openslide.PROPERTY_NAME_OBJECTIVE_POWER))
        self.bounds = self._scanned_bounds()
        self._to_srgb = self._color_conversion() if icc else None

    def __enter__(self) -> "Slide":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def properties(self) -> Mapping[str, str]:
        """What the file states, under OpenSlide's names."""
        return self._handle.properties

    def pixel_size(self, assume_mpp: float | None = None) -> PixelSize:
        """Microns per pixel: what the list says, else the slide, else 10 / objective power, else `assume_mpp`.

        `assume_mpp` also replaces a slide's implausible value, never a plausible one.

        Raises:
            SlideError: if nothing is known, or the value is implausible and nothing is assumed.
        """
        return choose_pixel_size(self.path.name, self.stated_pixel_size(), self._mpp, assume_mpp)

    def stated_pixel_size(self) -> PixelSize | None:
        """Microns per pixel as the file states it, plausible or not; None if it states nothing."""
        return stated_pixel_size(self.properties, self._file.image_dpi)

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
            return self._in_srgb(picture)
        return self._in_srgb(self._read_plain(x, y, width, height, size))

    def read_large_region(self, x: int, y: int, width: int, height: int, size: tuple[int, int]) -> np.ndarray:
        """As `read_region`, block by block, so that memory stays bounded however many pixels are shrunk.

        Where the downsample is no whole number, it varies between blocks by less than a pixel of the level a block.
        """
        picture = np.empty((size[1], size[0], 3), np.uint8)
        shrink = 1
        if self._tiff is not None:
            shrink = self._shrink_for(
                self._level_for(min(width / size[0], height / size[1])), (x, y, width, height), size
            )
        for left, top, columns, rows, where in self._blocks(x, y, width, height, size, shrink):
            inner = where[1].stop - where[1].start, where[0].stop - where[0].start
            picture[where] = self.read_region(left, top, columns, rows, inner)
        return picture

    def _blocks(
        self, x: int, y: int, width: int, height: int, size: tuple[int, int], shrink: int = 1
    ) -> Iterator[Block]:
        """Yield (x, y, width, height) of each block in level-0 pixels, and its rows and columns in the picture.

        Blocks are of bounded size on the level that they are read from, once that is shrunk while it is decoded. They
        come from top to bottom, column by column of blocks: what is shared with the next one is soon read again.
        """
        scale_x, scale_y = width / size[0], height / size[1]
        downsample = self._downsamples[self._level_for(min(scale_x, scale_y))]
        is_whole = downsample == int(downsample)
        pixel = int(downsample) if is_whole else 1  # blocks begin on whole pixels of the level, if there are such
        max_rows = min(MAX_READ_PX, MAX_READ_ROWS) if is_whole else MAX_READ_PX
        step_x = max(1, int(MAX_READ_PX * shrink * downsample / max(scale_x, scale_y)))
        step_y = max(1, int(max_rows * shrink * downsample / max(scale_x, scale_y)))
        for left, right in pairwise([*range(0, size[0], step_x), size[0]]):
            for top, bottom in pairwise([*range(0, size[1], step_y), size[1]]):
                x0, y0 = round(left * scale_x / pixel) * pixel, round(top * scale_y / pixel) * pixel
                x1 = width if right == size[0] else round(right * scale_x / pixel) * pixel
                y1 = height if bottom == size[1] else round(bottom * scale_y / pixel) * pixel
                yield x + x0, y + y0, x1 - x0, y1 - y0, (slice(top, bottom), slice(left, right))

    def read_tiles(
        self, coords: np.ndarray, width: int, height: int, size: tuple[int, int], out: np.ndarray | None = None
    ) -> np.ndarray:
        """Read many tiles of one size, each as `read_region` reads it, with the work that they share done once.

        Args:
            coords: (N, 2) level-0 (x, y) of top-left corners, best in row order.
            width: level-0 pixels of a tile.
            height: level-0 pixels of a tile.
            size: (width, height) in pixels of the pictures.
            out: (N, size[1], size[0], 3) uint8 to read into; one that is used again is written faster than a new one.

        Returns:
            (N, size[1], size[0], 3) uint8 RGB, which is `out` where that is given.

        Raises:
            SlideError: if a tile cannot be read; the message names its position.
        """
        if out is None:
            out = np.empty((len(coords), size[1], size[0], 3), np.uint8)
        assert out.shape == (len(coords), size[1], size[0], 3) and out.dtype == np.uint8
        is_read = np.zeros(len(coords), bool)
        if self._tiff is not None:
            level = self._level_for(min(width / size[0], height / size[1]))
            is_read[self._tiff.read_aligned(level, coords, (width, height), size, out)] = True
            if self._to_srgb is not None:
                for i in np.flatnonzero(is_read).tolist():
                    out[i] = self._in_srgb(out[i])
        for i in np.flatnonzero(~is_read).tolist():
            x, y = coords[i].tolist()
            out[i] = self.read_region(x, y, width, height, size)
        return out

    def read_whole(self, width: int, height: int) -> np.ndarray:
        """Read the whole slide as (height, width, 3) uint8 RGB, block by block, so that memory stays bounded."""
        picture = np.empty((height, width, 3), np.uint8)
        if self._tiff is not None:
            self._tiff.forget(MAX_READ_PX)
        with ThreadPoolExecutor(THUMBNAIL_THREADS) as pool:
            for x, y, columns, rows, where in self._blocks(0, 0, self.width, self.height, (width, height)):
                if self._is_unscanned(x, y, x + columns, y + rows):
                    picture[where] = BACKGROUND
                    continue
                size = where[1].stop - where[1].start, where[0].stop - where[0].start
                picture[where] = self._in_srgb(self._read_block(x, y, columns, rows, size, pool))
        if self._tiff is not None:
            self._tiff.forget()
        return self._blank_outside_bounds(picture)

    def _read_block(
        self, x: int, y: int, width: int, height: int, size: tuple[int, int], pool: ThreadPoolExecutor
    ) -> np.ndarray:
        """Read a part of a thumbnail: to the bit what OpenSlide reads, so that the tissue found on it is the same.

        Hence never shrunk while decoding, and not through our own reader where that rounds otherwise.
        """
        if self._handle is self._tiff:  # OpenSlide does not know the format
            return self._read_tiled(x, y, width, height, size)
        level = self._level_for(min(width / size[0], height / size[1]))
        begins_on_pixel = x % self._downsamples[level] == y % self._downsamples[level] == 0
        if self._tiff is not None and self._tiff.is_exact(level) and begins_on_pixel:
            block = self._read_tiled(x, y, width, height, size, may_shrink=False, pool=pool)
            if block is not None:
                return block
        return self._read_plain(x, y, width, height, size)

    def _level_for(self, downsample: float) -> int:
        """The coarsest level that is still fine enough for a downsample of level 0."""
        fine = [level for level, has in enumerate(self._downsamples) if has <= downsample * (1 + LEVEL_TOLERANCE)]
        return max(fine, default=0, key=lambda level: self._downsamples[level])

    def _read_tiled(
        self,
        x: int,
        y: int,
        width: int,
        height: int,
        size: tuple[int, int],
        may_shrink: bool = True,
        pool: ThreadPoolExecutor | None = None,
    ) -> np.ndarray | None:
        """Read through our own reader, shrunk while decoding; None where OpenSlide must decide what is not there."""
        level = self._level_for(min(width / size[0], height / size[1]))
        shrink = self._shrink_for(level, (x, y, width, height), size) if may_shrink else 1
        left, top, columns, rows = (value / self._downsamples[level] / shrink for value in (x, y, width, height))
        if shrink == 1:  # whole pixels, and linear between them, as OpenSlide does
            columns, rows = max(1, round(columns)), max(1, round(rows))
        x0, y0 = math.floor(left + ON_GRID), math.floor(top + ON_GRID)
        box = x0, y0, max(x0 + 1, math.ceil(left + columns - ON_GRID)), max(y0 + 1, math.ceil(top + rows - ON_GRID))
        try:
            if self._handle is not self._tiff and self._tiff.is_sparse(level, box, shrink):
                return None
            picture = self._tiff.read(level, box, shrink, pool)
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
            picture = self._handle.read_region((x, y), level, region)
        except (openslide.OpenSlideError, OSError, Image.DecompressionBombError) as error:
            raise self._unreadable(x, y, level, error) from error
        rgb = np.empty((region[1], region[0], 3), np.uint8)
        for rows in strips(region[1], region[0]):  # a large region is held twice, not four times
            rgba = np.asarray(picture.crop((0, rows.start, region[0], rows.stop)))
            rgb[rows] = rgba[..., :3]
            outside = rgba[..., 3] == 0  # beyond the slide, or never scanned (MRXS)
            if outside.any():
                rgb[rows][outside] = BACKGROUND
        return resize(rgb, size)

    def _unreadable(self, x: int, y: int, level: int, error: Exception) -> SlideError:
        return SlideError(f"{self.path.name} cannot be read at ({x}, {y}), level {level} ({first_line(error)})")

    def _scanned_bounds(self) -> tuple[int, int, int, int]:
        """OpenSlide's bounds, cut to the slide; the whole slide where they are missing or make no sense."""
        whole = 0, 0, self.width, self.height
        try:
            x, y, width, height = (int(self.properties[name]) for name in BOUNDS)
        except (KeyError, ValueError):
            return whole
        left, top, right, bottom = max(0, x), max(0, y), min(self.width, x + width), min(self.height, y + height)
        return (left, top, right - left, bottom - top) if left < right and top < bottom else whole

    def _is_unscanned(self, left: int, top: int, right: int, bottom: int) -> bool:
        x, y, width, height = self.bounds
        return right <= x or bottom <= y or left >= x + width or top >= y + height

    def _blank_outside_bounds(self, picture: np.ndarray) -> np.ndarray:
        """Make white what lies outside the bounds in a picture of the whole slide, in place."""
        x, y, width, height = self.bounds
        scale_x, scale_y = picture.shape[1] / self.width, picture.shape[0] / self.height
        picture[: math.floor(y * scale_y)] = picture[math.ceil((y + height) * scale_y) :] = BACKGROUND
        picture[:, : math.floor(x * scale_x)] = picture[:, math.ceil((x + width) * scale_x) :] = BACKGROUND
        return picture

    def _color_conversion(self) -> ToSrgb | None:
        if self.icc_profile is None:
            logger.info("%s carries no ICC profile: its colours stay as they are", self.path.name)
            return None
        try:
            return to_srgb(self.icc_profile)
        except ValueError as error:
            raise SlideError(f"{self.path.name}: {error}; do without --icc") from error

    def _in_srgb(self, picture: np.ndarray) -> np.ndarray:
        return picture if self._to_srgb is None else self._to_srgb(picture)
