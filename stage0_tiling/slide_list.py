"""Which slides a command works on: folders, files and CSV lists become a list of slides with unique names."""

import csv
from dataclasses import dataclass
from pathlib import Path

WHOLE_SLIDE_SUFFIXES = frozenset(
    ".svs .tif .tiff .ndpi .mrxs .scn .bif .vms .vmu .svslide .czi .dcm .isyntax".split()  # those that OpenSlide reads
)
IMAGE_SUFFIXES = frozenset(".png .jpg .jpeg .bmp".split())
PATH_COLUMNS = ("path", "slide_path", "slide", "filename", "file")


@dataclass(frozen=True)
class SlideEntry:
    """A slide to work on.

    Attributes:
        slide_id: file name without its last extension.
        path: absolute path.
        assume_mpp: um per pixel to assume for this slide, from the list's `mpp` column; None if it has none.
    """

    slide_id: str
    path: Path
    assume_mpp: float | None = None


def find_slides(sources: list[str]) -> list[SlideEntry]:
    """List the slides of some folders, files and CSV lists, in the order given, sorted within a folder.

    A folder is searched with all folders below it for the extensions that OpenSlide reads and for plain images; hidden
    files are left out, and a folder of `.dcm` files counts as one slide, named by its largest file. A named file is
    taken whatever its extension. A CSV has a column `path` (or `slide_path`, `slide`, `filename`, `file`), relative
    to its own folder, and optionally `mpp`, which stands for --assume_mpp for that slide; a
    `slides.csv` of an earlier run will do.

    Raises:
        FileNotFoundError: if a source does not exist.
        ValueError: if nothing is found, a CSV lacks its column, or two slides share a slide_id.
    """
    entries: dict[Path, SlideEntry] = {}
    for source in sources:
        for entry in _entries_of(Path(source).expanduser()):
            entries.setdefault(entry.path, entry)
    by_id: dict[str, SlideEntry] = {}
    for entry in entries.values():
        other = by_id.setdefault(entry.slide_id, entry)
        if other is not entry:
            raise ValueError(
                f"--slides: {other.path} and {entry.path} share the name {entry.slide_id}, "
                "and results are stored by name: rename one, or run them with another --output_dir"
            )
    return list(entries.values())


def _entries_of(source: Path) -> list[SlideEntry]:
    if not source.exists():
        raise FileNotFoundError(f"--slides {source}: no such file or folder")
    if source.is_dir():
        found = [_entry(path) for path in _slides_below(source)]
        if not found:
            suffixes = " ".join(sorted(WHOLE_SLIDE_SUFFIXES | IMAGE_SUFFIXES))
            raise ValueError(f"--slides {source}: no slide in this folder or below it; looked for {suffixes}")
        return found
    return _entries_of_csv(source) if source.suffix.lower() == ".csv" else [_entry(source)]


def _entry(path: Path, assume_mpp: float | None = None) -> SlideEntry:
    return SlideEntry(path.stem, path.absolute(), assume_mpp)


def _slides_below(folder: Path) -> list[Path]:
    dicom: dict[Path, list[Path]] = {}
    found = []
    for path in sorted(folder.rglob("*")):
        suffix = path.suffix.lower()
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or suffix not in WHOLE_SLIDE_SUFFIXES | IMAGE_SUFFIXES or not path.is_file():
            continue
        if suffix == ".dcm":
            dicom.setdefault(path.parent, []).append(path)
        else:
            found.append(path)
    # the levels of a DICOM slide are files of one folder, any of which opens the whole
    return sorted(found + [max(files, key=lambda file: file.stat().st_size) for files in dicom.values()])


def _entries_of_csv(source: Path) -> list[SlideEntry]:
    with source.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        column = next((name for name in PATH_COLUMNS if name in (reader.fieldnames or [])), None)
        if column is None:
            raise ValueError(
                f"--slides {source}: columns are {', '.join(reader.fieldnames or ['none'])}; "
                f"one of {', '.join(PATH_COLUMNS)} must name the slides"
            )
        entries = []
        for row in reader:
            if path := (row[column] or "").strip():
                entries.append(_entry(source.parent / path, _mpp(source, reader.line_num, row.get("mpp"))))
    if not entries:
        raise ValueError(f"--slides {source}: no slide in its column {column}")
    return entries


def _mpp(source: Path, line: int, text: str | None) -> float | None:
    if not (text or "").strip():
        return None
    try:
        return check_mpp(float(text))
    except ValueError as error:
        raise ValueError(f"--slides {source}: line {line}, mpp {text}: {error}") from error


def check_mpp(mpp: float) -> float:
    """Return `mpp` if it is a plausible number of um per pixel, else raise ValueError."""
    from stage0_tiling.slide import PLAUSIBLE_MPP

    if not PLAUSIBLE_MPP[0] <= mpp <= PLAUSIBLE_MPP[1]:
        raise ValueError(f"expected {PLAUSIBLE_MPP[0]} to {PLAUSIBLE_MPP[1]:g} um/px")
    return mpp
