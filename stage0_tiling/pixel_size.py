"""Microns per pixel: what a file states and what is made of it."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from xml.etree import ElementTree

import openslide

PLAUSIBLE_MPP = (0.05, 20.0)
OBJECTIVE_TIMES_MPP = 10.0  # 10x is 1 um/px by convention: 20x 0.5, 40x 0.25
ISOTROPIC_TOLERANCE = 0.01  # mpp of x and y that differ less are one number, rounded differently
CONTRADICTION = 1.1  # a list that differs from the slide by more than this factor deserves a warning
MAX_UPSAMPLING = 4.0
WARN_UPSAMPLING = 1.1
UM_PER_INCH = 25400.0
UM_PER_TIFF_UNIT = {"inch": UM_PER_INCH, "centimeter": 10000.0}
# what OME-XML calls a unit of length, both ways to write micro; without one it means um
UM_PER_OME_UNIT = {"\u00b5m": 1.0, "\u03bcm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6, "in": 25400.0}

logger = logging.getLogger(__name__)


class SlideError(ValueError):
    """This slide cannot be used; the message says why and what would help."""


@dataclass(frozen=True)
class PixelSize:
    """Microns per level-0 pixel, and where the number comes from.

    Attributes:
        x: um per pixel along x.
        y: um per pixel along y.
        source: `slide`, `objective`, `assumed` (--assume_mpp) or `list` (the column `mpp` of a list of slides).
    """

    x: float
    y: float
    source: str

    @property
    def mpp(self) -> float:
        """One number for both directions, their geometric mean."""
        return math.sqrt(self.x * self.y)

    @property
    def is_plausible(self) -> bool:
        return all(PLAUSIBLE_MPP[0] <= value <= PLAUSIBLE_MPP[1] for value in (self.x, self.y))


def stated_pixel_size(
    properties: Mapping[str, str], dpi: tuple[float | None, float | None] = (None, None)
) -> PixelSize | None:
    """What a slide states: its mpp, else the OME-XML, the TIFF resolution, the image's dpi, the objective power.

    Args:
        properties: under OpenSlide's names.
        dpi: (x, y) dots per inch of a plain image.

    Returns:
        None if it states nothing; the value may be implausible.
    """
    x = positive(properties.get(openslide.PROPERTY_NAME_MPP_X))
    y = positive(properties.get(openslide.PROPERTY_NAME_MPP_Y))
    if not (x or y):
        x, y = _of_ome_xml(properties.get("tiff.ImageDescription", ""))
    if not (x or y):
        unit = UM_PER_TIFF_UNIT.get(properties.get("tiff.ResolutionUnit", ""))
        per_x, per_y = (positive(properties.get(f"tiff.{axis}Resolution")) for axis in "XY")
        x, y = (unit / value if unit and value else None for value in (per_x, per_y))
    if not (x or y):
        x, y = (UM_PER_INCH / value if value else None for value in dpi)
    if x or y:
        x, y = x or y, y or x
        if abs(x / y - 1) <= ISOTROPIC_TOLERANCE:
            x = y = math.sqrt(x * y)
        return PixelSize(x, y, "slide")
    power = positive(properties.get(openslide.PROPERTY_NAME_OBJECTIVE_POWER))
    return PixelSize(*(OBJECTIVE_TIMES_MPP / power,) * 2, "objective") if power else None


def choose_pixel_size(name: str, stated: PixelSize | None, mpp: float | None, assume_mpp: float | None) -> PixelSize:
    """The pixel size to work with: `mpp` if given, else a plausible one that is stated, else `assume_mpp`.

    Raises:
        SlideError: if nothing is known, or the stated value is implausible and nothing stands for it.
    """
    if mpp is not None:
        if stated and stated.is_plausible and max(mpp / stated.mpp, stated.mpp / mpp) > CONTRADICTION:
            logger.warning("%s says %.4g um/px, the list of slides %.4g: the list is believed", name, stated.mpp, mpp)
        return PixelSize(mpp, mpp, "list")
    if stated and stated.is_plausible:
        return stated
    if assume_mpp is not None:
        return PixelSize(assume_mpp, assume_mpp, "assumed")
    mend = "state the true value with --assume_mpp, e.g. --assume_mpp 0.5 for a 20x scan"
    if stated is None:
        raise SlideError(f"{name} says neither its mpp nor its objective power: {mend}")
    raise SlideError(
        f"{name} says {stated.mpp:.4g} um/px, which is implausible "
        f"(expected {PLAUSIBLE_MPP[0]} to {PLAUSIBLE_MPP[1]:g}): {mend}"
    )


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


def positive(text: object) -> float | None:
    """The number that a text states if it is finite and above 0, else None."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) and value > 0 else None


def _of_ome_xml(text: str) -> tuple[float | None, float | None]:
    """PhysicalSizeX and -Y of the first image of an OME-TIFF, in um."""
    if "<OME" not in text and ":OME" not in text:
        return None, None
    try:
        pixels = ElementTree.fromstring(text).find(".//{*}Pixels")
    except (ElementTree.ParseError, ValueError):  # the latter where a text declares an encoding other than its own
        return None, None
    if pixels is None:
        return None, None
    units = (UM_PER_OME_UNIT.get(pixels.get(f"PhysicalSize{axis}Unit", "um")) for axis in "XY")
    values = (positive(pixels.get(f"PhysicalSize{axis}")) for axis in "XY")
    x, y = (unit * value if unit and value else None for unit, value in zip(units, values, strict=True))
    return x, y
