"""Pixels of a tiled TIFF without OpenSlide: only the compressed tiles that are needed, each once, straight to RGB.

Memory per open file: at most 512 MiB of decoded tiles, and 128 MiB unless two and a half rows of compressed tiles are
more, which they are beyond 69,000 px at 256 px a tile. Tiles that lie on the grid of compressed tiles need none of it.
Besides, 17 bytes per compressed tile of where it lies (2.6 MB for a level of 100,000 x 100,000 px) once a tile of that
level is read, 1 MiB of compressed bytes per reading thread, and what is being decoded.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from itertools import product
from pathlib import Path
from typing import Self

import cv2
import numpy as np

from stage0_tiling.aligned import Alignment, align
from stage0_tiling.memory import Lender
from stage0_tiling.tiff_codecs import TileError
from stage0_tiling.tiff_levels import MANY_TILES, TiffLevel, TiffPyramid, read_pyramid
from stage0_tiling.tile_cache import SHARED_ROWS, TileCache, bytes_for

READ_BYTES = 2**20  # most that is read at once of compressed tiles that lie one behind the other
BACKGROUND = 255


class TiledTiff:
    """An open tiled TIFF. Safe to read from several threads. Names are OpenSlide's where it has them.

    Attributes:
        dimensions: (width, height) of level 0 in pixels.
        level_count: of the pyramid.
        level_downsamples: level-0 pixels per pixel, of each level.
        properties: stated resolution.
    """

    def __init__(self, file: FileIO, pyramid: TiffPyramid):
        self._levels = pyramid.levels
        self.properties = pyramid.properties
        self.level_count = len(self._levels)
        first = self._levels[0]
        self.dimensions = first.width, first.height
        ratios = ((first.width / level.width, first.height / level.height) for level in self._levels)
        self.level_downsamples = tuple(sum(ratio) / 2 for ratio in ratios)
        # A tile that lies wholly within a box is not kept: warm memory is written half again as fast as new. Boxes that
        # overlap show when one of these is wanted once more; from then on all are kept.
        self.forget()
        self._file = file  # read by position: several threads share it, and nothing is mapped
        self._file_bytes = os.fstat(self._file.fileno()).st_size

    @classmethod
    def open(cls, path: Path, dimensions: Sequence[tuple[int, int]] | None = None) -> Self | None:
        """Open `path`; None if it cannot be read this way.

        `dimensions` are those of the levels that OpenSlide found; without, the TIFF's own structure counts.
        """
        if not path.is_file():
            return None
        try:
            file = path.open("rb", buffering=0)
        except OSError:
            return None
        if (pyramid := read_pyramid(path, dimensions, file)) is None:
            file.close()
            return None
        tiff = cls(file, pyramid)
        try:
            for level in range(tiff.level_count):
                tiff._try_one_tile(level)
                tiff._levels[level].release()  # the tissue is found on another one
        except (TileError, OSError):
            tiff.close()
            return None
        return tiff

    @property
    def num_tiles(self) -> int:
        """Compressed tiles of level 0."""
        return math.prod(self._levels[0].grid)

    def forget(self, width: int | None = None) -> None:
        """Drop all tiles that were kept; what is read from now on is another pass over the slide.

        `width` is how many pixels of a level that pass reads side by side, in boxes from top to bottom that share one
        row of compressed tiles; None for all of them, in tiles that may overlap.
        """
        self._cache = TileCache(
            max(
                bytes_for(level.width, level.decoder.shape[0], bytes_per_pixel=3)
                if width is None
                else int(SHARED_ROWS * min(width, level.width) * level.decoder.shape[0] * 3)
                for level in self._levels
            )
        )
        self._taken = [np.zeros(level.grid, bool) for level in self._levels]
        self._keeps_all = False
        # what such a pass has decoded is not wanted after it; new pages cost some milliseconds, though
        self._new = _empty if width is None or self.num_tiles <= MANY_TILES else Lender()

    def close(self) -> None:
        self._file.close()

    def shrinks(self, level: int) -> tuple[int, ...]:
        """Factors by which tiles of a level can be shrunk while they are decoded."""
        return self._levels[level].decoder.shrinks

    def is_exact(self, level: int) -> bool:
        """Whether a level read at full size is to the bit what OpenSlide reads."""
        return self._levels[level].decoder.is_exact

    def is_sparse(self, level: int, box: tuple[int, int, int, int], shrink: int = 1) -> bool:
        """Whether a box needs tiles that the file does not hold."""
        if self._levels[level].is_whole:
            return False
        rows, columns = self._tiles_in(level, box, shrink)
        return not self._levels[level].counts[rows.start : rows.stop, columns.start : columns.stop].all()

    def read(
        self, level: int, box: tuple[int, int, int, int], shrink: int = 1, pool: ThreadPoolExecutor | None = None
    ) -> np.ndarray:
        """Read a box of a level.

        Args:
            level: of the pyramid.
            box: (left, top, right, bottom) in pixels of the level divided by `shrink`.
            shrink: one of `shrinks(level)`.
            pool: threads that decode the tiles of the box; None for the caller's.

        Returns:
            (bottom - top, right - left, 3) uint8 RGB; what lies beyond the level, or is not in the file, is white.

        Raises:
            TileError: if a tile is damaged.
        """
        left, top, right, bottom = box
        here = self._levels[level]
        width, height = -(-here.width // shrink), -(-here.height // shrink)
        tile_height, tile_width = (side // shrink for side in here.decoder.shape)
        rows, columns = self._tiles_in(level, box, shrink)
        is_full = left >= 0 and top >= 0 and right <= width and bottom <= height
        is_full = is_full and not self.is_sparse(level, box, shrink)
        x, y = columns.start * tile_width, rows.start * tile_height
        if is_full and box == (x, y, x + tile_width, y + tile_height):  # one tile, handed on without a copy
            tile = self._tile(level, rows.start, columns.start, shrink, keep=False)
            return tile.copy() if self._keeps_all else tile
        picture = self._new((bottom - top, right - left, 3))
        if not is_full:
            picture.fill(BACKGROUND)

        def paste(place: tuple[int, int]) -> None:
            row, column = place
            y, x = row * tile_height, column * tile_width
            y0, y1 = max(top, y), min(bottom, y + tile_height, height)
            x0, x1 = max(left, x), min(right, x + tile_width, width)
            is_whole = y0 == y and x0 == x and y1 == y + tile_height and x1 == x + tile_width
            tile = self._tile(level, row, column, shrink, keep=not is_whole)
            picture[y0 - top : y1 - top, x0 - left : x1 - left] = tile[y0 - y : y1 - y, x0 - x : x1 - x]

        _for_each(paste, [place for place in product(rows, columns) if here.counts[place]], pool)
        return picture

    def read_aligned(
        self, level: int, coords: np.ndarray, box: tuple[int, int], size: tuple[int, int], out: np.ndarray
    ) -> np.ndarray:
        """Decode the tiles that consist of whole compressed tiles, of which none was wanted before.

        Args:
            level: to read.
            coords: (N, 2) level-0 (x, y) of top-left corners.
            box: (width, height) of the tiles in level-0 pixels.
            size: (width, height) of the tiles in pixels of the picture.
            out: (N, size[1], size[0], 3) uint8, to read into.

        Returns:
            (M,) places in `out` that hold their tile now. Others do not lie on the grid of compressed tiles, are not in
            the file, are damaged, or are wanted more than once: all that `read` takes care of.
        """
        here = self._levels[level]
        self._keeps_all |= _overlap(coords, box)
        found = align(
            coords,
            box,
            size,
            downsample=self.level_downsamples[level],
            dimensions=(here.width, here.height),
            compressed=here.decoder.shape[::-1],
            shrinks=here.decoder.shrinks,
        )
        if found is None or self._keeps_all:
            return np.empty(0, int)
        width = here.grid[1]
        within = (np.arange(found.down)[:, None] * width + np.arange(found.across)).ravel()
        places = (found.rows * width + found.columns)[:, None] + within  # (M, down * across), row by row
        try:
            offsets, counts = here.offsets.take(places), here.counts.take(places)
        except OSError:  # the reason is found anew where it is told
            return np.empty(0, int)
        taken = self._taken[level].ravel()
        keep = ((counts > 0) & (offsets + counts <= self._file_bytes) & ~taken[places]).all(axis=1)
        taken[places[keep]] = True
        index = found.index[keep]
        if len(index) == 0:
            return index
        streams = self._in_few_reads(offsets[keep].ravel().tolist(), counts[keep].ravel().tolist())
        try:
            for place in index.tolist():
                self._decode_into(out[place], here, found, streams)
        except (TileError, OSError):  # read tile by tile, which finds the one at fault
            return np.empty(0, int)
        return index

    @staticmethod
    def _decode_into(out: np.ndarray, level: TiffLevel, found: Alignment, streams: Iterator[memoryview]) -> None:
        """Decode the next compressed tiles into one picture."""
        if found.down == found.across == 1:
            level.decoder(next(streams), found.shrink, out)
            return
        height, width = (side // found.shrink for side in level.decoder.shape)
        for y in range(0, found.down * height, height):
            for x in range(0, found.across * width, width):
                out[y : y + height, x : x + width] = level.decoder(next(streams), found.shrink)

    def _in_few_reads(self, offsets: list[int], counts: list[int]) -> Iterator[memoryview]:
        """Compressed tiles, in order; those that lie one behind the other in the file are read at once."""
        begin = 0
        while begin < len(offsets):
            start, stop, end = offsets[begin], offsets[begin] + counts[begin], begin + 1
            while end < len(offsets) and offsets[end] == stop and stop + counts[end] - start <= READ_BYTES:
                stop += counts[end]
                end += 1
            block = memoryview(os.pread(self._file.fileno(), stop - start, start))
            for offset, count in zip(offsets[begin:end], counts[begin:end], strict=True):
                yield block[offset - start : offset - start + count]
            begin = end

    def _tiles_in(self, level: int, box: tuple[int, int, int, int], shrink: int) -> tuple[range, range]:
        """Rows and columns of the tiles that a box touches."""
        here = self._levels[level]
        left, top, right, bottom = box
        tile_height, tile_width = (side // shrink for side in here.decoder.shape)
        rows, columns = here.grid
        return (
            range(max(0, top // tile_height), min(rows, -(-bottom // tile_height))),
            range(max(0, left // tile_width), min(columns, -(-right // tile_width))),
        )

    def _tile(self, level: int, row: int, column: int, shrink: int, keep: bool) -> np.ndarray:
        here, taken = self._levels[level], self._taken[level]
        self._keeps_all |= bool(taken[row, column])
        if not keep and not self._keeps_all:
            taken[row, column] = True
            return self._make(here, row, column, shrink)
        return self._cache.get((level, row, column, shrink), lambda: self._make(here, row, column, shrink))

    def _make(self, level: TiffLevel, row: int, column: int, shrink: int) -> np.ndarray:
        """A tile divided by `shrink`, which the decoder does, but for tiles that reach beyond the level.

        Those hold padding, which may be black and must be white before it is shrunk with the pixels beside it.
        """
        height, width = level.decoder.shape
        inside_x, inside_y = level.width - column * width, level.height - row * height
        if shrink == 1 or (inside_x >= width and inside_y >= height):
            return self._decode(level, row, column, shrink)
        tile = self._decode(level, row, column, 1)
        tile[inside_y:], tile[:, inside_x:] = BACKGROUND, BACKGROUND
        return cv2.resize(tile, (width // shrink, height // shrink), interpolation=cv2.INTER_AREA)

    def _decode(self, level: TiffLevel, row: int, column: int, shrink: int) -> np.ndarray:
        offset, count = int(level.offsets[row, column]), int(level.counts[row, column])
        if offset + count > self._file_bytes:
            raise TileError(f"tile ({column}, {row}) lies beyond the end of the file")
        data = os.pread(self._file.fileno(), count, offset)
        height, width = level.decoder.shape
        try:
            return level.decoder(data, shrink, self._new((height // shrink, width // shrink, 3)))
        except TileError as error:
            raise TileError(f"tile ({column}, {row}): {error}") from error

    def _try_one_tile(self, level: int) -> None:
        """Decode a tile near the middle of a level, to learn early of a variant that the decoder does not know."""
        here = self._levels[level]
        there = np.flatnonzero(here.counts)
        if len(there):
            row, column = divmod(int(there[len(there) // 2]), here.grid[1])
            self._decode(here, row, column, 1)


def _empty(shape: tuple[int, ...]) -> np.ndarray:
    return np.empty(shape, np.uint8)


def _for_each(
    work: Callable[[tuple[int, int]], None], places: list[tuple[int, int]], pool: ThreadPoolExecutor | None
) -> None:
    if pool is None or len(places) == 1:
        for place in places:
            work(place)
        return
    waiting = [pool.submit(work, place) for place in places]
    try:
        for future in waiting:
            future.result()
    finally:
        for future in waiting:
            future.cancel()


def _overlap(coords: np.ndarray, box: tuple[int, int]) -> bool:
    """Whether tiles that follow each other share pixels."""
    is_near = abs(coords[1:] - coords[:-1]) < box
    return bool((is_near[:, 0] & is_near[:, 1]).any())
