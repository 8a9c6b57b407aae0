"""Compressed tiles of a TIFF to RGB: JPEG at full, half, quarter or eighth size, and JPEG 2000.

A decoder is a callable `decoder(data, shrink, out=None) -> (H, W, 3) uint8 RGB` with the attributes `shape`, (height,
width) of a tile at full size, `shrinks`, the factors that it can shrink by while it decodes, and `is_exact`, whether
tiles are at full size to the bit what OpenSlide decodes. It refuses a tile whose size is not `shape` over `shrink`.
"""

from dataclasses import dataclass

import cv2
import imagecodecs
import numpy as np
import simplejpeg
from tifffile import COMPRESSION, PHOTOMETRIC, TiffPage

SOI = b"\xff\xd8"
APP_SEGMENTS = range(0xE0, 0xF0)
COMMENT = 0xFE
# Adobe's APP14 segment, but for its last byte: 0 the components are RGB, 1 they are YCbCr
ADOBE = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"
JPEG_COLORS = {PHOTOMETRIC.RGB: b"\x00", PHOTOMETRIC.YCBCR: b"\x01"}
JPEG_SHRINKS = (1, 2, 4, 8)
JPEG2000_SIZE = b"\xff\x4f\xff\x51"  # start of the codestream, and of its first segment, which gives the sizes
JPEG2000 = {COMPRESSION.APERIO_JP2000_YCBC, COMPRESSION.APERIO_JP2000_RGB, COMPRESSION.JPEG2000}


class TileError(ValueError):
    """A compressed tile cannot be decoded."""


@dataclass(frozen=True)
class JpegDecoder:
    """Decodes JPEG tiles with libjpeg-turbo, which releases the GIL and shrinks within the inverse transform.

    Attributes:
        shape: (height, width) of a tile in pixels.
        header: what stands before every tile's own segments: start of image, colour space, shared tables.
    """

    shape: tuple[int, int]
    header: bytes
    is_exact = True

    @property
    def shrinks(self) -> tuple[int, ...]:
        return tuple(n for n in JPEG_SHRINKS if not any(side % n for side in self.shape))

    def __call__(self, data: bytes | memoryview, shrink: int, out: np.ndarray | None = None) -> np.ndarray:
        height, width = self.shape[0] // shrink, self.shape[1] // shrink
        try:
            stream = self.header + data[_after_app_segments(data) :]
            # strict: a damaged tile is an error, as it is to OpenSlide; a buffer: a tile that claims to be huge is, too
            tile = simplejpeg.decode_jpeg(
                stream,
                min_height=height,
                min_width=width,
                min_factor=shrink,
                buffer=np.empty((height, width, 3), np.uint8) if out is None else out,
                strict=True,
            )
        except (ValueError, IndexError) as error:
            raise TileError(str(error) or "not a JPEG") from error
        if tile.shape != (height, width, 3):
            raise TileError(f"{tile.shape[1]} x {tile.shape[0]}, not {width} x {height} pixels")
        return tile


@dataclass(frozen=True)
class Jpeg2000Decoder:
    """Decodes JPEG 2000 tiles with OpenJPEG, which releases the GIL.

    Attributes:
        shape: (height, width) of a tile in pixels.
        is_ycbcr: whether the components are YCbCr, as in Aperio's compression 33003.
    """

    shape: tuple[int, int]
    is_ycbcr: bool
    shrinks: tuple[int, ...] = (1,)

    @property
    def is_exact(self) -> bool:
        return not self.is_ycbcr  # else colours are rounded differently

    def __call__(self, data: bytes | memoryview, shrink: int, out: np.ndarray | None = None) -> np.ndarray:
        assert shrink == 1
        try:
            tile = imagecodecs.jpeg2k_decode(data, numthreads=1)
        except (imagecodecs.Jpeg2kError, ValueError) as error:
            raise TileError(str(error)) from error
        if tile.shape != (*self.shape, 3) or tile.dtype != np.uint8:
            raise TileError(f"JPEG 2000 of shape {tile.shape} and type {tile.dtype}, not {(*self.shape, 3)} and uint8")
        if self.is_ycbcr and not _has_small_chroma(data):  # imagecodecs turns it to RGB where it enlarges the chroma
            tile = cv2.cvtColor(tile[..., [0, 2, 1]], cv2.COLOR_YCrCb2RGB)
        if out is None:
            return tile
        out[:] = tile
        return out


def decoder_of(page: TiffPage) -> JpegDecoder | Jpeg2000Decoder | None:
    """The decoder of a page's tiles; None if it is not tiled RGB of 8 bits in a compression that is decoded here."""
    plain = page.samplesperpixel == 3 and page.bitspersample == 8 and page.planarconfig == 1
    if not (page.is_tiled and plain and page.imagedepth == page.tiledepth == 1):
        return None
    shape = page.tilelength, page.tilewidth
    if page.compression == COMPRESSION.JPEG and page.photometric in JPEG_COLORS:
        tables = page.jpegtables or SOI + b"\xff\xd9"
        # the TIFF's photometric decides on the colour space, whatever the tiles say: scanners contradict themselves
        header = SOI + ADOBE + JPEG_COLORS[page.photometric] + tables[_after_app_segments(tables) : -2]
        return JpegDecoder(shape, header)
    if page.compression in JPEG2000 and page.photometric in JPEG_COLORS:
        is_ycbcr = page.compression == COMPRESSION.APERIO_JP2000_YCBC
        return Jpeg2000Decoder(shape, is_ycbcr)
    return None


def _after_app_segments(stream: bytes | memoryview) -> int:
    """Where a JPEG's first segment begins that is no application data (JFIF, Adobe, ...) or comment."""
    if stream[:2] != SOI:
        raise TileError(f"not a JPEG: starts with {bytes(stream[:2]).hex(' ') or 'nothing'}")
    at = 2
    while stream[at] == 0xFF and (stream[at + 1] in APP_SEGMENTS or stream[at + 1] == COMMENT):
        at += 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
    return at


def _has_small_chroma(stream: bytes | memoryview) -> bool:
    """Whether the second component of a JPEG 2000 has fewer columns or rows than the first."""
    head = bytes(stream[:256])
    components = head.find(JPEG2000_SIZE) + len(JPEG2000_SIZE) + 38  # 3 bytes each: depth, step across, step down
    return head[components + 4 : components + 6] != head[components + 1 : components + 3]
