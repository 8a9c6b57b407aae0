"""Where the compressed tiles of a TIFF pyramid lie. Only pages of the pyramid are looked at, never label or macro."""

import gc
import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from pathlib import Path

import numpy as np
import tifffile

from stage0_tiling.tiff_codecs import Jpeg2000Decoder, JpegDecoder, decoder_of

UNITS = {2: "inch", 3: "centimeter"}
MANY_TILES = 20_000  # of a level, whose tables are not kept in memory while they are not wanted
STORED_AS = {3: "u2", 4: "u4", 13: "u4", 16: "u8", 18: "u8"}  # TIFF's types of integers
logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # a broken slide is told by name, once


@dataclass(frozen=True)
class StoredTable:
    """A table of where compressed tiles lie that is long enough to be left in the file until it is wanted.

    Attributes:
        file: that holds it.
        begin: byte at which it begins.
        dtype: of its numbers, with their byte order.
        grid: (rows, columns).
    """

    file: FileIO
    begin: int
    dtype: np.dtype
    grid: tuple[int, int]

    def read(self) -> np.ndarray:
        """(rows, columns) int64; OSError if the file can no longer be read."""
        num_bytes = self.grid[0] * self.grid[1] * self.dtype.itemsize
        stored = os.pread(self.file.fileno(), num_bytes, self.begin)
        if len(stored) < num_bytes:
            raise OSError("the file has become shorter")
        return np.frombuffer(stored, self.dtype).astype(np.int64).reshape(self.grid)


@dataclass(frozen=True)
class TiffLevel:
    """One level of a pyramid.

    Attributes:
        width: pixels.
        height: pixels.
        grid: (rows, columns) of compressed tiles.
        offsets: (rows, columns) int64, byte at which each compressed tile begins.
        counts: (rows, columns) int64, bytes of each compressed tile; 0 where the file holds none.
        is_whole: whether the file holds all tiles.
        decoder: of the tiles.
    """

    width: int
    height: int
    grid: tuple[int, int]
    is_whole: bool
    decoder: JpegDecoder | Jpeg2000Decoder
    offset_table: np.ndarray | StoredTable
    count_table: np.ndarray | StoredTable

    @cached_property
    def offsets(self) -> np.ndarray:
        return _numbers(self.offset_table)

    @cached_property
    def counts(self) -> np.ndarray:
        return _numbers(self.count_table)

    def release(self) -> None:
        """Forget long tables until they are wanted again."""
        for name in ("offsets", "counts"):
            self.__dict__.pop(name, None)


@dataclass(frozen=True)
class TiffPyramid:
    """Levels of a TIFF, finest first, and its stated resolution under OpenSlide's names."""

    levels: tuple[TiffLevel, ...]
    properties: dict[str, str]


def read_pyramid(path: Path, dimensions: Sequence[tuple[int, int]] | None, file: FileIO) -> TiffPyramid | None:
    """Find the levels of a tiled TIFF.

    Args:
        path: the file.
        file: the same, open for as long as levels are wanted: long tables are read from it at need.
        dimensions: (width, height) of the levels that OpenSlide found; None takes what the TIFF's own structure says.

    Returns:
        None if this is no tiled TIFF, or any level is missing, ambiguous, or in a form that is not decoded here.
    """
    pyramid = _read(path, dimensions, file)
    if pyramid is not None and math.prod(pyramid.levels[0].grid) > MANY_TILES:
        gc.collect(1)  # tifffile's pages refer to each other, and hold what was read of them as Python's integers
    return pyramid


def _read(path: Path, dimensions: Sequence[tuple[int, int]] | None, file: FileIO) -> TiffPyramid | None:
    try:
        with tifffile.TiffFile(path) as tiff:
            pages = _pages_of_size(tiff, dimensions) if dimensions else list(_pages_of_series(tiff))
            levels = [_level(page, file) for page in pages if page is not None]
            if not levels or None in levels or len(levels) != len(pages):
                return None
            return TiffPyramid(tuple(levels), _resolution(tiff.pages[0]))
    except (tifffile.TiffFileError, OSError, ValueError, IndexError, KeyError, TypeError, AttributeError):
        return None  # tifffile meets broken tags with any of these


def _pages_of_size(tiff: tifffile.TiffFile, dimensions: Sequence[tuple[int, int]]) -> list[tifffile.TiffPage | None]:
    """The one tiled page of each size; None where there is none, or more than one."""
    tiled = [page for page in tiff.pages if isinstance(page, tifffile.TiffPage) and page.is_tiled]
    found = ([page for page in tiled if (page.imagewidth, page.imagelength) == size] for size in dimensions)
    return [pages[0] if len(pages) == 1 else None for pages in found]


def _pages_of_series(tiff: tifffile.TiffFile) -> Iterator[tifffile.TiffPage | None]:
    """The first image with its smaller copies, kept as sub-images or as pages marked as reduced."""
    first = tiff.pages[0]
    if len(tiff.series[0].levels[0].pages) == 1:
        yield first
        if len(tiff.series[0].levels) > 1:
            yield from (level.keyframe for level in tiff.series[0].levels[1:])
        else:
            yield from (page for page in tiff.pages[1:] if _is_copy(page, first))


def _is_copy(page: tifffile.TiffPage, first: tifffile.TiffPage) -> bool:
    smaller = page.imagewidth < first.imagewidth and page.imagelength < first.imagelength
    skew = abs(page.imagewidth * first.imagelength / first.imagewidth - page.imagelength)
    return page.is_tiled and page.is_reduced and smaller and skew < 2


def _level(page: tifffile.TiffPage, file: FileIO) -> TiffLevel | None:
    decoder = decoder_of(page)
    if decoder is None:
        return None
    height, width = decoder.shape
    grid = -(-page.imagelength // height), -(-page.imagewidth // width)
    offsets, counts = (np.array(values, np.int64) for values in (page.dataoffsets, page.databytecounts))
    if not offsets.size == counts.size == grid[0] * grid[1]:
        return None
    named = (("TileOffsets", offsets), ("TileByteCounts", counts))
    tables = (_table(values.reshape(grid), page.tags.get(name), file) for name, values in named)
    return TiffLevel(page.imagewidth, page.imagelength, grid, bool(counts.all()), decoder, *tables)


def _table(values: np.ndarray, tag: tifffile.TiffTag | None, file: FileIO) -> np.ndarray | StoredTable:
    """The values themselves, or where the file holds them, if they are many and lie there as they are."""
    if values.size <= MANY_TILES or tag is None or tag.dtype not in STORED_AS:
        return values
    dtype = np.dtype(STORED_AS[tag.dtype]).newbyteorder(tag.parent.byteorder)
    stored = StoredTable(file, tag.valueoffset, dtype, values.shape)
    try:
        return stored if np.array_equal(stored.read(), values) else values
    except OSError:
        return values


def _numbers(table: np.ndarray | StoredTable) -> np.ndarray:
    return table.read() if isinstance(table, StoredTable) else table


def _resolution(page: tifffile.TiffPage) -> dict[str, str]:
    found = {
        "tiff.ResolutionUnit": UNITS.get(int(page.resolutionunit), ""),
        "tiff.ImageDescription": page.description,
    }
    for axis, value in zip("XY", page.resolution, strict=True):
        found[f"tiff.{axis}Resolution"] = str(value)
    return found
