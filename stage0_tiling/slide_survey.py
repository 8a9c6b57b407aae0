"""What survey.py says of one slide: its file, its pixels, its tissue, how sharp it is, how many tiles it would give."""

import hashlib
from dataclasses import dataclass, field

import cv2
import numpy as np
import tifffile

from stage0_tiling.pixel_size import MAX_UPSAMPLING, OBJECTIVE_TIMES_MPP, PixelSize, SlideError
from stage0_tiling.plan import GUESSED_PIXEL_SIZE
from stage0_tiling.slide import Slide
from stage0_tiling.slide_files import files_of
from stage0_tiling.slide_list import SlideEntry
from stage0_tiling.tissue import TissueMask, find_tissue, make_grid, tiles_on_tissue

TILINGS = ((256, 0.5), (224, 0.5), (512, 0.5), (256, 1.0))  # pixels and um per pixel, the common ones
SHARPNESS_MPPS = (0.5, 1.0, 2.0, 4.0)  # sharpness is measured at the finest of these that needs no enlarging
NOT_ENLARGED = 1.1
NUM_SPOTS, SPOT_PX = 8, 256
# Real H&E in focus has 0.3 to 1.6; blurred by a Gaussian of 1.5 px it has 0.02 to 0.06.
BLURRED_BELOW = 0.05
CONTRADICTION = 1.7  # cameras differ, but by less than from one objective to the next
NUM_PROBES, PROBE_PX = 3, 256  # along each side, for the fingerprint
DICOM_SYNTAXES = {
    "1.2.840.10008.1.2.1": "none",
    "1.2.840.10008.1.2.4.50": "jpeg",
    "1.2.840.10008.1.2.4.90": "jpeg2000",
    "1.2.840.10008.1.2.4.91": "jpeg2000",
}
COORDS_BYTES = 16  # of a tile, beside its features in float16


@dataclass(frozen=True)
class SurveyRow:
    """A row of survey.csv; None is written as an empty field.

    Attributes:
        path: relative to the table, so that it can be given to --slides.
        width_mm: of what was scanned, which is less than the slide's pixels in MIRAX and the like.
        height_mm: of what was scanned.
        file_mb: 10^6 bytes of all files of the slide.
        tissue_fraction: of the slide's area.
        sharpness: variance of the Laplacian over the variance of grey, median of up to 8 spots of tissue.
        sharpness_mpp: um per pixel at which it is measured.
        tiles: of 256 px at 0.5 um/px, 224 at 0.5, 512 at 0.5, 256 at 1; None where these would be enlarged too much.
        has_icc: whether the slide carries a colour profile.
        fingerprint: of the size and some pixels; copies of a slide share it.
        problems: what deserves a look.
        failed: whether the slide cannot be opened or read.
    """

    slide_id: str
    path: str
    format: str | None = None
    width: int | None = None
    height: int | None = None
    width_mm: float | None = None
    height_mm: float | None = None
    levels: int | None = None
    mpp: float | None = None
    mpp_source: str | None = None
    objective: float | None = None
    compression: str | None = None
    file_mb: float | None = None
    tissue_fraction: float | None = None
    tissue_mm2: float | None = None
    sharpness: float | None = None
    sharpness_mpp: float | None = None
    tiles: tuple[int | None, ...] = (None,) * len(TILINGS)
    has_icc: bool | None = None
    fingerprint: str | None = None
    problems: list[str] = field(default_factory=list)
    failed: bool = False


def survey_slide(
    entry: SlideEntry, *, min_tissue: float, assume_mpp: float | None = None
) -> tuple[SurveyRow, TissueMask]:
    """Look at one slide. Reads a thumbnail and a few spots, never a label or macro image.

    Raises:
        SlideError: if the slide cannot be opened or read.
    """
    with Slide(entry.path, mpp=entry.mpp) as slide:
        problems = []
        try:
            pixel_size = slide.pixel_size(entry.assume_mpp or assume_mpp)
        except SlideError:
            pixel_size = None
            problems.append("implausible mpp" if slide.stated_pixel_size() else "no mpp")
        tissue = find_tissue(slide, pixel_size or GUESSED_PIXEL_SIZE)
        if not tissue.mask.any():
            problems.append("no tissue found")
        measured = _measure(slide, tissue, pixel_size, min_tissue) if pixel_size else {}
        if measured.get("sharpness") is not None and measured["sharpness"] < BLURRED_BELOW:
            problems.append("blurred")
        if pixel_size and slide.objective and _contradict(pixel_size.mpp, OBJECTIVE_TIMES_MPP / slide.objective):
            problems.append(f"{pixel_size.mpp:.2g} um/px contradicts its objective, {slide.objective:g}x")
        if slide.num_levels == 1 and max(slide.width, slide.height) > 20_000:
            problems.append("no pyramid: slow to read")
        row = SurveyRow(
            slide_id=entry.slide_id,
            path=str(entry.path),
            format=slide.format,
            width=slide.width,
            height=slide.height,
            levels=slide.num_levels,
            objective=slide.objective,
            compression=compression_of(slide),
            file_mb=round(sum(file.stat().st_size for file in files_of(entry.path)) / 1e6, 3),
            tissue_fraction=round(tissue.fraction, 6),
            has_icc=slide.icc_profile is not None,
            fingerprint=fingerprint(slide),
            problems=problems,
            **measured,
        )
    return row, tissue


def _contradict(mpp: float, of_objective: float) -> bool:
    return max(mpp / of_objective, of_objective / mpp) > CONTRADICTION


def _measure(slide: Slide, tissue: TissueMask, pixel_size: PixelSize, min_tissue: float) -> dict:
    """What needs to know how large a pixel is."""
    width_mm, height_mm = slide.bounds[2] * pixel_size.x / 1e3, slide.bounds[3] * pixel_size.y / 1e3
    slide_mm2 = slide.width * pixel_size.x * slide.height * pixel_size.y / 1e6
    mpp = next((mpp for mpp in SHARPNESS_MPPS if pixel_size.mpp <= NOT_ENLARGED * mpp), None)
    found = sharpness(slide, tissue, pixel_size, mpp) if mpp else None
    return {
        "mpp": round(pixel_size.mpp, 6),
        "mpp_source": pixel_size.source,
        "width_mm": round(width_mm, 3),
        "height_mm": round(height_mm, 3),
        "tissue_mm2": round(tissue.fraction * slide_mm2, 3),
        "sharpness": None if found is None else round(found, 4),
        "sharpness_mpp": None if found is None else mpp,
        "tiles": tuple(_count_tiles(slide, tissue, pixel_size, px, at, min_tissue) for px, at in TILINGS),
    }


def _count_tiles(
    slide: Slide, tissue: TissueMask, pixel_size: PixelSize, tile_size: int, mpp: float, min_tissue: float
) -> int | None:
    if pixel_size.mpp > MAX_UPSAMPLING * mpp:
        return None
    grid = make_grid(tile_size, 0, mpp, pixel_size)
    return len(tiles_on_tissue(tissue, slide.width, slide.height, grid, min_tissue))


def sharpness(slide: Slide, tissue: TissueMask, pixel_size: PixelSize, mpp: float) -> float | None:
    """How much of the contrast is fine detail: median over spots of var(Laplacian) / var(grey), at `mpp`.

    The variance of the Laplacian is a common measure of focus (Pech-Pacheco et al., 2000); divided by the variance of
    the grey values it does not depend on how strongly a slide is stained.

    Returns:
        None if there is no tissue.
    """
    grid = make_grid(SPOT_PX, 0, mpp, pixel_size)
    for min_tissue in (0.8, 0.4, 0.0):
        coords = tiles_on_tissue(tissue, slide.width, slide.height, grid, min_tissue)
        if len(coords):
            break
    else:
        return None
    spots = coords[np.linspace(0, len(coords) - 1, min(NUM_SPOTS, len(coords))).astype(int)]
    size = (SPOT_PX, SPOT_PX)
    pictures = (slide.read_region(x, y, grid.tile_width, grid.tile_height, size) for x, y in spots.tolist())
    return float(np.median([detail_over_contrast(picture) for picture in pictures]))


def detail_over_contrast(picture: np.ndarray) -> float:
    """Variance of the Laplacian over the variance of grey of (H, W, 3) uint8 RGB; 0 where there is no contrast."""
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY).astype(np.float32)
    return float(cv2.Laplacian(grey, cv2.CV_32F).var() / max(grey.var(), 1.0))


def fingerprint(slide: Slide) -> str | None:
    """Hash of the size and of a few level-0 pixels, spread over the slide; None where these are all one colour."""
    digest = hashlib.blake2b(f"{slide.width} {slide.height}".encode(), digest_size=8)
    is_blank = True
    for row in range(NUM_PROBES):
        for column in range(NUM_PROBES):
            x, y = (int((i + 0.5) / NUM_PROBES * side) for i, side in ((column, slide.width), (row, slide.height)))
            probe = slide.read_region(x, y, PROBE_PX, PROBE_PX, (PROBE_PX, PROBE_PX))
            inside = probe[: max(1, slide.height - y), : max(1, slide.width - x)]
            is_blank &= bool((inside == inside[0, 0]).all())
            digest.update(probe.tobytes())
    return None if is_blank else digest.hexdigest()


def compression_of(slide: Slide) -> str | None:
    """How the pixels of a DICOM, MIRAX or TIFF-like slide are compressed; None where the file does not tell."""
    if syntax := slide.properties.get("dicom.TransferSyntaxUID"):
        return DICOM_SYNTAXES.get(syntax)
    if mirax := [value for key, value in slide.properties.items() if key.endswith(".IMAGE_FORMAT")]:
        return mirax[0].lower()
    try:
        with tifffile.TiffFile(slide.path) as tiff:
            name = tiff.pages[0].compression.name.lower()
            return "jpeg2000" if "jp2000" in name else name
    except (tifffile.TiffFileError, OSError, ValueError, IndexError, AttributeError):
        return None
