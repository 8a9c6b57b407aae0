"""Where the compressed tiles of a TIFF pyramid lie. Only pages of the pyramid are looked at, never label or macro."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile

from stage0_tiling.tiff_codecs import Jpeg2000Decoder, JpegDecoder, decoder_of

UNITS = {2: "inch", 3: "centimeter"}


@dataclass(frozen=True)
class TiffLevel:
    """One level of a pyramid.

    Attributes:
        width: pixels.
        height: pixels.
        offsets: (rows, columns) int64, byte at which each compressed tile begins.
        counts: (rows, columns) int64, bytes of each compressed tile; 0 where the file holds none.
        decoder: of the tiles.
    """

    width: int
    height: int
    offsets: np.ndarray
    counts: np.ndarray
    decoder: JpegDecoder | Jpeg2000Decoder


@dataclass(frozen=True)
class TiffPyramid:
    """Levels of a TIFF, finest first, and its stated resolution under OpenSlide's names."""

    levels: tuple[TiffLevel, ...]
    properties: dict[str, str]


def read_pyramid(path: Path, dimensions: Sequence[tuple[int, int]] | None) -> TiffPyramid | None:
    """Find the levels of a tiled TIFF.

    Args:
        path: the file.
        dimensions: (width, height) of the levels that OpenSlide found; None takes what the TIFF's own structure says.

    Returns:
        None if this is no tiled TIFF, or any level is missing, ambiguous, or in a form that is not decoded here.
    """
    try:
        with tifffile.TiffFile(path) as tiff:
            pages = _pages_of_size(tiff, dimensions) if dimensions else list(_pages_of_series(tiff))
            levels = [_level(page) for page in pages if page is not None]
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


def _level(page: tifffile.TiffPage) -> TiffLevel | None:
    decoder = decoder_of(page)
    if decoder is None:
        return None
    height, width = decoder.shape
    grid = -(-page.imagelength // height), -(-page.imagewidth // width)
    offsets, counts = (np.array(values, np.int64) for values in (page.dataoffsets, page.databytecounts))
    if not offsets.size == counts.size == grid[0] * grid[1]:
        return None
    return TiffLevel(page.imagewidth, page.imagelength, offsets.reshape(grid), counts.reshape(grid), decoder)


def _resolution(page: tifffile.TiffPage) -> dict[str, str]:
    found = {
        "tiff.ResolutionUnit": UNITS.get(int(page.resolutionunit), ""),
        "tiff.ImageDescription": page.description,
    }
    for axis, value in zip("XY", page.resolution, strict=True):
        found[f"tiff.{axis}Resolution"] = str(value)
    return found
