"""Which files below a folder are slides, where a slide is several files, or files lie about that are none.

Left out are hidden files, the parts of slides of several files (MIRAX, Hamamatsu VMS and VMU, DICOM), and what stage 0
has written itself. A slide is named by its file, without the last extension. DICOM slides are grouped by their series:
one that has a folder to itself is named by the folder, else by its largest file.
"""

import logging
import os
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from command_line import first_line

WHOLE_SLIDE_SUFFIXES = frozenset(
    ".svs .tif .tiff .ndpi .mrxs .scn .bif .vms .vmu .svslide .czi .dcm .isyntax".split()  # those of scanners
)
IMAGE_SUFFIXES = frozenset(".png .jpg .jpeg .bmp".split())
UNREADABLE_SUFFIXES = frozenset(".vsi .zvi .lif .kfb .sdpc .tmap .qptiff".split())  # slides all the same
INDEX_SUFFIXES = frozenset((".vms", ".vmu"))  # text that names the files with pixels, and one with a macro image
MIRAX_INDEX = "slidedat.ini"
RUN_PICTURES = frozenset(("overlays", "thumbnails"))  # folders of a run, which is known by those below
RUN_RECORDS = frozenset(("claims", "state"))  # the former is made first, the latter with the first slide that is done
SURVEY_FOLDER, SURVEY_PICTURES = "survey_slides", "survey*"  # of survey.py: a folder, and pictures beside it
DICOM_SLIDE_CLASS = "1.2.840.10008.5.1.4.1.1.77.1.6"  # VL Whole Slide Microscopy Image Storage
DICOM_LABELS = frozenset(("LABEL", "OVERVIEW"))  # types of images that may show a patient's name
DICOM_TAGS = ["SOPClassUID", "SeriesInstanceUID", "ImageType"]

logger = logging.getLogger(__name__)


def slides_below(folder: Path) -> list[tuple[str, Path]]:
    """Find the slides of a folder and all folders below it, links to folders followed.

    Returns:
        (slide_id, path), sorted by path. A file that claims to be DICOM and is not counts as a slide, so that it is
        reported and not passed over; DICOM of another kind and series of nothing but label images do not.
    """
    found = []
    unreadable: Counter[str] = Counter()
    for here, names in _folders(folder):
        unreadable.update(suffix for name in names if (suffix := Path(name).suffix.lower()) in UNREADABLE_SUFFIXES)
        paths = [here / name for name in names if _is_candidate(name)]
        parts = {name.lower() for path in paths if path.suffix.lower() in INDEX_SUFFIXES for name in _names_in(path)}
        paths = [path for path in paths if path.name.lower() not in parts and (path.is_file() or path.is_symlink())]
        if (here / SURVEY_FOLDER).is_dir():
            paths = [path for path in paths if not (path.match(SURVEY_PICTURES) and _is_image(path))]
        dicom = [path for path in paths if path.suffix.lower() == ".dcm"]
        single = [path for path in paths if path.suffix.lower() != ".dcm"]
        found += [(path.stem, path) for path in single]
        if dicom:
            found += _dicom_slides(here, dicom, has_company=bool(single))
    for suffix, count in unreadable.items():
        logger.warning("%s: %d %s left out, which cannot be read: convert them to tiled TIFF", folder, count, suffix)
    return sorted(found, key=lambda slide: slide[1])


def files_of(path: Path) -> list[Path]:
    """The files that make up the slide which `path` opens, itself among them: what a copy of the slide must take along.

    MIRAX has a folder beside it, Hamamatsu's index names its parts, the levels of DICOM slides are files of one folder.
    DICOM's label and macro images are files of their own, which nobody needs and nobody shall copy: they are left out.
    """
    suffix = path.suffix.lower()
    if suffix == ".mrxs":
        return [path, *sorted(file for file in path.with_suffix("").rglob("*") if file.is_file())]
    if suffix not in INDEX_SUFFIXES | {".dcm"}:
        return [path]
    beside = sorted(file for file in path.parent.iterdir() if file.is_file())
    if suffix in INDEX_SUFFIXES:
        names = {name.lower() for name in _names_in(path)}
        return [path, *(file for file in beside if file.name.lower() in names)]
    series = _series_of(path)
    dicom = [file for file in beside if file.suffix.lower() == ".dcm"]
    return [file for file in dicom if file == path or _series_of(file) == series and not _shows_label(file)]


def _folders(top: Path) -> Iterator[tuple[Path, list[str]]]:
    """Each folder with the names of its files, but for hidden ones and those that hold no slides of their own."""
    seen = set()

    def skip(error: OSError) -> None:
        logger.warning("%s cannot be looked through (%s); its slides are left out", error.filename, error.strerror)

    for folder, below, names in os.walk(top, onerror=skip, followlinks=True):
        here = Path(folder)
        if (real := os.path.realpath(folder)) in seen or any(name.lower() == MIRAX_INDEX for name in names):
            below.clear()  # a link in a circle, or the parts of a MIRAX slide
            continue
        seen.add(real)
        ours = {SURVEY_FOLDER} | (frozenset() if RUN_RECORDS.isdisjoint(below) else RUN_PICTURES)
        below[:] = sorted(name for name in below if not name.startswith(".") and name not in ours)
        yield here, sorted(names)


def _is_candidate(name: str) -> bool:
    return not name.startswith(".") and Path(name).suffix.lower() in WHOLE_SLIDE_SUFFIXES | IMAGE_SUFFIXES


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES


def _names_in(index: Path) -> set[str]:
    """Files that a Hamamatsu index names, one of them the macro image, which must never be taken for a slide."""
    try:
        lines = index.read_text(encoding="latin-1").splitlines()
    except OSError:
        return set()
    return {value.strip() for _, equals, value in (line.partition("=") for line in lines) if equals}


def _dicom_slides(folder: Path, paths: list[Path], has_company: bool) -> list[tuple[str, Path]]:
    """One slide per series: the largest file that holds a level, any of which opens the whole."""
    series: dict[str, list[Path]] = {}
    broken = []
    for path in paths:
        try:
            kind, uid, image_type = _dicom_header(path)
        except ValueError as error:
            logger.warning("%s is no DICOM file: %s", path, error)
            broken.append(path)
            continue
        if kind == DICOM_SLIDE_CLASS:
            series.setdefault(uid, []).extend([path] if "VOLUME" in image_type else [])
        else:
            logger.info("%s is DICOM, but no slide; left out", path)
    for uid in [uid for uid, files in series.items() if not files]:
        logger.warning("%s: DICOM series %s has label or overview images only; left out", folder, uid)
        del series[uid]
    largest = [max(files, key=lambda file: (file.stat().st_size, file.name)) for files in series.values()]
    names_the_folder = len(largest) == 1 and not broken and not has_company
    slides = [(folder.resolve().name if names_the_folder else path.stem, path) for path in largest]
    return slides + [(path.stem, path) for path in broken]


def _series_of(path: Path) -> str:
    try:
        return _dicom_header(path)[1]
    except ValueError:
        return str(path)


def _shows_label(path: Path) -> bool:
    return not DICOM_LABELS.isdisjoint(_dicom_header(path)[2])


@lru_cache(100_000)  # whoever asks for the files of each slide of a folder reads each header once
def _dicom_header(path: Path) -> tuple[str, str, list[str]]:
    """SOP class, series and image type of a file, read without its pixels.

    Raises:
        ValueError: if it is no DICOM file.
    """
    import pydicom
    from pydicom.errors import InvalidDicomError

    try:
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=DICOM_TAGS)
        return (
            str(header.get("SOPClassUID", "")),
            str(header.get("SeriesInstanceUID", path.name)),
            list(header.get("ImageType", ())),
        )
    except (InvalidDicomError, OSError, ValueError, KeyError, TypeError, AttributeError, NotImplementedError) as error:
        raise ValueError(first_line(error)) from error
