"""Colours of a scanner to sRGB, by the ICC profile that a slide carries. Profiles are read, never written."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openslide
import tifffile
from PIL import Image, ImageCms


@dataclass(frozen=True)
class ToSrgb:
    """Converts pictures from one profile to sRGB, with the profile's own rendering intent. Threads may share it."""

    transform: ImageCms.ImageCmsTransform

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        """Convert (H, W, 3) uint8 RGB to a new array of the same form."""
        return np.array(self.transform.apply(Image.fromarray(picture)))


def to_srgb(profile: bytes) -> ToSrgb:
    """Build the conversion from an ICC profile.

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
