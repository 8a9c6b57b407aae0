"""Colours of a scanner to sRGB, by the ICC profile that a slide carries. Profiles are read, never written."""

import io
from functools import lru_cache
from pathlib import Path
from threading import Lock

import cv2
import numpy as np
import openslide
import tifffile
from PIL import Image, ImageCms

NUM_COLOURS = 2**24
# LittleCMS converts some 20 million pixels a second, and holds the GIL. A table of all colours, 64 MiB, gives the very
# same numbers several times as fast; making it costs as much as converting every colour once.
TABLE_AFTER_PX = NUM_COLOURS
MAX_PROFILES = 4  # that are kept, with their tables; slides of one scanner share one


class ToSrgb:
    """Converts pictures from one profile to sRGB, with the profile's own rendering intent. Threads may share it."""

    def __init__(self, transform: ImageCms.ImageCmsTransform):
        self._transform = transform
        self._table: np.ndarray | None = None
        self._num_converted = 0
        self._lock = Lock()

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        """Convert (H, W, 3) uint8 RGB to a new array of the same form."""
        if self._table is None and self._num_converted < TABLE_AFTER_PX:
            self._num_converted += picture.shape[0] * picture.shape[1]
            return self._convert(picture)
        with self._lock:
            if self._table is None:
                self._table = self._make_table()
        return _look_up(self._table, picture)

    def _convert(self, picture: np.ndarray) -> np.ndarray:
        return np.array(self._transform.apply(Image.fromarray(picture)))

    def _make_table(self) -> np.ndarray:
        """(2**24,) uint32: bytes R, G, B and one unused, at red * 65536 + green * 256 + blue."""
        table = np.zeros((256, 256, 256, 4), np.uint8)
        picture = np.empty((256, 256, 3), np.uint8)
        picture[..., 1], picture[..., 2] = np.mgrid[:256, :256]
        for red in range(256):
            picture[..., 0] = red
            table[red, ..., :3] = self._convert(picture)
        return table.reshape(-1).view(np.uint32)


def _look_up(table: np.ndarray, picture: np.ndarray) -> np.ndarray:
    padded = cv2.cvtColor(picture, cv2.COLOR_RGB2BGRA)  # read as one little-endian number: 255, red, green, blue
    index = padded.view("<u4")[..., 0].astype(np.intp)
    index &= NUM_COLOURS - 1
    found = np.take(table, index)[..., None].view(np.uint8)
    return cv2.cvtColor(found, cv2.COLOR_RGBA2RGB)


@lru_cache(MAX_PROFILES)
def to_srgb(profile: bytes) -> ToSrgb:
    """The conversion by an ICC profile.

    Raises:
        ValueError: if this is no profile of RGB colours that LittleCMS can use.
    """
    try:
        source = ImageCms.getOpenProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != "RGB":
            raise ValueError(f"its ICC profile is of {source.profile.xcolor_space.strip()} colours, not RGB")
        intent = ImageCms.getDefaultIntent(source)
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), "RGB", "RGB", intent)
    except (ImageCms.PyCMSError, OSError, TypeError) as error:
        raise ValueError(f"its ICC profile cannot be used ({error})") from error
    return ToSrgb(transform)


def openslide_profile(slide: openslide.OpenSlide) -> bytes | None:
    """The ICC profile of an open slide; no bytes at all if it has one that LittleCMS cannot read."""
    try:
        profile = slide.color_profile
    except (ImageCms.PyCMSError, OSError):
        return b""
    return profile.tobytes() if profile else None


def tiff_profile(path: Path) -> bytes | None:
    """The ICC profile of a TIFF's first page, for files that OpenSlide does not open."""
    try:
        with tifffile.TiffFile(path) as tiff:
            return tiff.pages[0].iccprofile
    except (tifffile.TiffFileError, OSError, ValueError, IndexError, KeyError):
        return None
