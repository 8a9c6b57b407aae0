"""Open the file of a slide: by OpenSlide where it knows the format, by our own reader of tiled TIFFs, or by Pillow.

Associated images (label, macro) may show a patient's name: no format is opened in a way that could take one for the
slide.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import openslide
from PIL import Image, UnidentifiedImageError

from command_line import first_line
from stage0_tiling.icc import openslide_profile, tiff_profile
from stage0_tiling.memory import return_free_memory
from stage0_tiling.pixel_size import SlideError, positive
from stage0_tiling.slide_files import WHOLE_SLIDE_SUFFIXES
from stage0_tiling.tiff_levels import MANY_TILES
from stage0_tiling.tile_cache import bytes_for
from stage0_tiling.tiled_tiff import TiledTiff

READERS = ("auto", "openslide", "tiff")
# vendors whose levels are plain grids of tiles; those of others overlap, are padded or come in several regions
PLAIN_TIFF = ("aperio", "generic-tiff")
# Suffixes whose first image may be opened without OpenSlide. In other formats that may be a label or a macro image,
# and a .mrxs file is itself a JPEG of the glass: where OpenSlide does not know such a file, nobody may try.
FIRST_IMAGE_IS_THE_SLIDE = (".svs", ".tif", ".tiff")
BACKGROUND = 255
# Of a damaged or large image Pillow warns with a line of its own code; what cannot be read of it is told by name.
warnings.filterwarnings("ignore", module=r"PIL\.")


class ClosedOpenSlide:
    """What OpenSlide knows of a file that our own reader reads. It is opened again where that one cannot.

    OpenSlide keeps 16 bytes a compressed tile and whatever its format needs, which are of no use meanwhile.

    Attributes:
        properties: what the file states.
        dimensions: (width, height) of level 0 in pixels.
        level_count: of the pyramid.
        level_downsamples: level-0 pixels per pixel, of each level.
    """

    def __init__(self, path: Path, slide: openslide.OpenSlide):
        """Take over what `slide` knows, and close it."""
        self.properties: Mapping[str, str] = dict(slide.properties)
        self.dimensions = slide.dimensions
        self.level_count = slide.level_count
        self.level_downsamples = slide.level_downsamples
        slide.close()
        self._path = path
        self._slide: openslide.OpenSlide | None = None
        self._lock = Lock()

    def read_region(self, location: tuple[int, int], level: int, size: tuple[int, int]) -> Image.Image:
        """As OpenSlide's; an error of it if the file can no longer be opened."""
        with self._lock:
            if self._slide is None:
                self._slide = _with_cache(openslide.OpenSlide(self._path))
        return self._slide.read_region(location, level, size)

    def close(self) -> None:
        if self._slide is not None:
            self._slide.close()


@dataclass(frozen=True)
class OpenedFile:
    """An open file of a slide.

    Attributes:
        handle: OpenSlide's, or what stands in for it.
        format: OpenSlide's vendor name, `tiff`, or `image/png` and the like.
        tiff: our own reader, where it can read the tiles; it may be the handle.
        icc_profile: that the file carries, None if it has none.
        image_dpi: of a plain image, along x and y, where it states them.
    """

    handle: openslide.AbstractSlide | ClosedOpenSlide | TiledTiff
    format: str
    tiff: TiledTiff | None = None
    icc_profile: bytes | None = None
    image_dpi: tuple[float | None, float | None] = (None, None)

    def close(self) -> None:
        self.handle.close()
        if self.tiff is not None:
            self.tiff.close()


def open_file(path: Path, reader: str) -> OpenedFile:
    """Open with OpenSlide where it knows the format, else our own reader, else Pillow, with the whole image in memory.

    Args:
        path: of a slide or plain image.
        reader: one of READERS; `auto` and `tiff` use our own reader where they can, `openslide` does without it.

    Raises:
        SlideError: if it is missing, or no slide or image.
    """
    if not path.exists():
        raise SlideError(f"{path.name} does not exist")
    if path.is_file() and path.stat().st_size == 0:
        raise SlideError(f"{path.name} is empty (0 bytes): copy it anew")
    try:
        slide = openslide.OpenSlide(path)
    except openslide.OpenSlideError as error:
        if reader != "openslide" and _may_open_tiff(path) and (tiff := TiledTiff.open(path)):
            return OpenedFile(tiff, "tiff", tiff, tiff_profile(path))
        if isinstance(error, openslide.OpenSlideUnsupportedFormatError):
            return _open_image(path)
        raise _unopenable(path, error) from error
    except OSError as error:
        raise _unopenable(path, error) from error
    vendor, profile = slide.properties[openslide.PROPERTY_NAME_VENDOR], openslide_profile(slide)
    if reader != "openslide" and vendor in PLAIN_TIFF and (tiff := TiledTiff.open(path, slide.level_dimensions)):
        if slide.level_count == 1 and (pyramid := _hidden_pyramid(path)):
            slide.close()
            tiff.close()
            return OpenedFile(pyramid, vendor, pyramid, profile)
        opened = OpenedFile(ClosedOpenSlide(path, slide), vendor, tiff, profile)
        if tiff.num_tiles > MANY_TILES:
            return_free_memory()
        return opened
    return OpenedFile(_with_cache(slide), vendor, None, profile)


def _hidden_pyramid(path: Path) -> TiledTiff | None:
    """The levels that an OME-TIFF keeps as sub-images of its first, where OpenSlide does not look for them."""
    tiff = TiledTiff.open(path)
    if tiff and tiff.level_count == 1:
        tiff.close()
        return None
    return tiff


def _may_open_tiff(path: Path) -> bool:
    """Whether the file's first image is the slide, though OpenSlide cannot open it."""
    vendor = openslide.OpenSlide.detect_format(path)
    return path.suffix.lower() in FIRST_IMAGE_IS_THE_SLIDE and vendor in (None, *PLAIN_TIFF)


def _open_image(path: Path) -> OpenedFile:
    suffix = path.suffix.lower()
    if suffix in WHOLE_SLIDE_SUFFIXES and suffix not in FIRST_IMAGE_IS_THE_SLIDE:
        raise SlideError(f"{path.name} is no slide that OpenSlide can open: {_hint(path)}")
    try:
        with Image.open(path) as image:
            return OpenedFile(
                openslide.ImageSlide(_on_white(image)),
                f"image/{(image.format or 'unknown').lower()}",
                icc_profile=image.info.get("icc_profile"),
                image_dpi=tuple(positive(value) for value in image.info.get("dpi", (None, None))),
            )
    except UnidentifiedImageError as error:
        raise SlideError(f"{path.name} is no slide or image that OpenSlide or Pillow can open") from error
    except (OSError, Image.DecompressionBombError) as error:
        raise _unopenable(path, error) from error


def _unopenable(path: Path, error: Exception) -> SlideError:
    why = first_line(error)
    mend = "save it in JPEG or another usual compression" if "unsupported" in why.lower() else "is the file whole?"
    return SlideError(f"{path.name} cannot be opened ({why}): {mend}")


def _hint(path: Path) -> str:
    if path.suffix.lower() == ".mrxs" and not path.with_suffix("").is_dir():
        return f"the folder {path.stem} that belongs to it is missing"
    if path.suffix.lower() in (".czi", ".isyntax"):
        return "convert it to a tiled TIFF"
    return "is the file whole?"


def _with_cache(slide: openslide.OpenSlide) -> openslide.OpenSlide:
    """Give it room for what it decodes, 4 bytes a pixel, while a slide is read row by row."""
    tile_height = slide.properties.get("openslide.level[0].tile-height", "")
    height = int(tile_height) if tile_height.isdecimal() else 256
    slide.set_cache(openslide.OpenSlideCache(bytes_for(slide.dimensions[0], height, bytes_per_pixel=4)))
    return slide


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (BACKGROUND,) * 4), image).convert("RGB")
