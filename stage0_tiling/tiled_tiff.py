"""Pixels of a tiled TIFF without OpenSlide: only the compressed tiles that are needed, each once, straight to RGB.

Memory: 128 MiB of decoded tiles per open file, however large the slide, plus one tile per reading thread.
"""

import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from itertools import product
from pathlib import Path
from threading import Lock
from typing import Self

import cv2
import numpy as np

from stage0_tiling.tiff_codecs import TileError
from stage0_tiling.tiff_levels import TiffLevel, TiffPyramid, read_pyramid

CACHE_BYTES = 128 * 2**20  # two rows of 256 px tiles of a slide 85,000 px wide, or twice that at half scale
BACKGROUND = 255


class TileCache:
    """Keeps the tiles used last, up to a number of bytes. Threads that want one tile at a time decode it once."""

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._tiles: OrderedDict[Hashable, np.ndarray] = OrderedDict()
        self._pending: dict[Hashable, Future[np.ndarray]] = {}
        self._lock = Lock()

    def get(self, key: Hashable, make: Callable[[], np.ndarray]) -> np.ndarray:
        """The tile of `key`, made by `make` unless it is here or another thread is at it."""
        with self._lock:
            if (tile := self._tiles.get(key)) is not None:
                self._tiles.move_to_end(key)
                return tile
            if (pending := self._pending.get(key)) is None:
                mine = self._pending[key] = Future()
        if pending is not None:
            return pending.result()
        try:
            tile = make()
        except BaseException as error:  # also an interrupt: the threads that wait must not wait for ever
            with self._lock:
                del self._pending[key]
            mine.set_exception(error)
            raise
        with self._lock:
            del self._pending[key]
            self._tiles[key] = tile
            self._num_bytes += tile.nbytes
            while self._num_bytes > self._max_bytes:
                self._num_bytes -= self._tiles.popitem(last=False)[1].nbytes
        mine.set_result(tile)
        return tile


class TiledTiff:
    """An open tiled TIFF. Safe to read from several threads. Names are OpenSlide's where it has them.

    Attributes:
        dimensions: (width, height) of level 0 in pixels.
        level_count: of the pyramid.
        level_downsamples: level-0 pixels per pixel, of each level.
        properties: stated resolution.
    """

    def __init__(self, path: Path, pyramid: TiffPyramid):
        self._levels = pyramid.levels
        self.properties = pyramid.properties
        self.level_count = len(self._levels)
        first = self._levels[0]
        self.dimensions = first.width, first.height
        ratios = ((first.width / level.width, first.height / level.height) for level in self._levels)
        self.level_downsamples = tuple(sum(ratio) / 2 for ratio in ratios)
        self._cache = TileCache(CACHE_BYTES)
        # A tile that lies wholly within a box is not kept: warm memory is written half again as fast as new. Boxes that
        # overlap show when one of these is wanted once more; from then on all are kept.
        self._taken = [np.zeros(level.counts.shape, bool) for level in self._levels]
        self._keeps_all = False
        self._is_whole = [bool(level.counts.all()) for level in self._levels]
        self._file = path.open("rb", buffering=0)  # read by position: several threads share it, and nothing is mapped
        self._file_bytes = os.fstat(self._file.fileno()).st_size

    @classmethod
    def open(cls, path: Path, dimensions: Sequence[tuple[int, int]] | None = None) -> Self | None:
        """Open `path`; None if it cannot be read this way.

        `dimensions` are those of the levels that OpenSlide found; without, the TIFF's own structure counts.
        """
        if not path.is_file() or (pyramid := read_pyramid(path, dimensions)) is None:
            return None
        tiff = cls(path, pyramid)
        try:
            for level in range(tiff.level_count):
                tiff._try_one_tile(level)
        except (TileError, OSError):
            tiff.close()
            return None
        return tiff

    def close(self) -> None:
        self._file.close()

    def shrinks(self, level: int) -> tuple[int, ...]:
        """Factors by which tiles of a level can be shrunk while they are decoded."""
        return self._levels[level].decoder.shrinks

    def is_sparse(self, level: int, box: tuple[int, int, int, int], shrink: int = 1) -> bool:
        """Whether a box needs tiles that the file does not hold."""
        if self._is_whole[level]:
            return False
        rows, columns = self._tiles_in(level, box, shrink)
        return not self._levels[level].counts[rows.start : rows.stop, columns.start : columns.stop].all()

    def read(self, level: int, box: tuple[int, int, int, int], shrink: int = 1) -> np.ndarray:
        """Read a box of a level.

        Args:
            level: of the pyramid.
            box: (left, top, right, bottom) in pixels of the level divided by `shrink`.
            shrink: one of `shrinks(level)`.

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
        picture = np.empty((bottom - top, right - left, 3), np.uint8)
        if not is_full:
            picture.fill(BACKGROUND)
        for row, column in product(rows, columns):
            if here.counts[row, column]:
                y, x = row * tile_height, column * tile_width
                y0, y1 = max(top, y), min(bottom, y + tile_height, height)
                x0, x1 = max(left, x), min(right, x + tile_width, width)
                is_whole = y0 == y and x0 == x and y1 == y + tile_height and x1 == x + tile_width
                tile = self._tile(level, row, column, shrink, keep=not is_whole)
                picture[y0 - top : y1 - top, x0 - left : x1 - left] = tile[y0 - y : y1 - y, x0 - x : x1 - x]
        return picture

    def _tiles_in(self, level: int, box: tuple[int, int, int, int], shrink: int) -> tuple[range, range]:
        """Rows and columns of the tiles that a box touches."""
        here = self._levels[level]
        left, top, right, bottom = box
        tile_height, tile_width = (side // shrink for side in here.decoder.shape)
        rows, columns = here.counts.shape
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
        try:
            tile = level.decoder(data, shrink)
        except TileError as error:
            raise TileError(f"tile ({column}, {row}): {error}") from error
        expected = tuple(side // shrink for side in level.decoder.shape)
        if tile.shape[:2] != expected:
            raise TileError(f"tile ({column}, {row}) is {tile.shape[1]} x {tile.shape[0]}, not {expected[::-1]} pixels")
        return tile

    def _try_one_tile(self, level: int) -> None:
        """Decode a tile near the middle of a level, to learn early of a variant that the decoder does not know."""
        rows, columns = np.nonzero(self._levels[level].counts)
        if len(rows):
            self._decode(self._levels[level], int(rows[len(rows) // 2]), int(columns[len(rows) // 2]), 1)
