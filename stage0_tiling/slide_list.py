"""Which slides a command works on: folders, files and CSV lists become a list of slides with unique names."""

import csv
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from csv_separator import separator_of
from stage0_tiling.pixel_size import PLAUSIBLE_MPP
from stage0_tiling.slide_files import IMAGE_SUFFIXES, WHOLE_SLIDE_SUFFIXES, slides_below

PATH_COLUMNS = ("path", "slide_path", "slide", "filename", "file")
MAX_NAME_BYTES = 200  # file systems allow 255, of which half-written files, claims and suffixes take some
READ_FROM_SLIDE = ("slide", "objective")  # mpp_source of a value that a table of ours repeats


@dataclass(frozen=True)
class SlideEntry:
    """A slide to work on.

    Attributes:
        slide_id: file name without its last extension, or what the list's column `slide_id` says.
        path: absolute path.
        assume_mpp: um per pixel to assume where the slide states none, or an implausible one; None if nothing is known.
        mpp: um per pixel to use whatever the slide states, from the list's column `mpp`; None if it has none.
    """

    slide_id: str
    path: Path
    assume_mpp: float | None = None
    mpp: float | None = None


def find_slides(sources: list[str]) -> list[SlideEntry]:
    """List the slides of some folders, files and CSV lists, in the order given, sorted within a folder.

    A folder is searched as `slide_files.slides_below` says. A named file is taken whatever its extension. A CSV has a
    column `path` (or `slide_path`, `slide`, `filename`, `file`) of files, or of folders with one slide each, relative
    to its own folder, and optionally `slide_id`, a name other than the file's; `mpp`, which stands whatever the slide
    states; and `assume_mpp`, which stands for --assume_mpp for that slide. A `slides.csv` or `survey.csv` of an earlier
    run will do: an `mpp` whose `mpp_source` is `slide` or `objective` is read from the slide again, one that was
    `assumed` is assumed again.

    Raises:
        FileNotFoundError: if a source does not exist.
        ValueError: if nothing is found, a CSV lacks its column, two slides share a slide_id, one slide is
            given twice with different names or um/px, or a name is not fit for
            the files that are called after it.
    """
    entries: dict[Path, SlideEntry] = {}
    for source in sources:
        for entry in _entries_of(Path(source).expanduser()):
            if (other := entries.setdefault(entry.path, entry)) != entry:
                raise ValueError(
                    f"--slides: {entry.path} is given twice, as {_told(other)} and as {_told(entry)}: give it once"
                )
    by_id: dict[str, SlideEntry] = {}
    for entry in entries.values():
        _check_names(entry)
        other = by_id.setdefault(entry.slide_id, entry)
        if other is not entry:
            raise ValueError(
                f"--slides: {other.path} and {entry.path} share the name {entry.slide_id}, and results are stored by "
                "name: rename one, list them in a CSV with a column slide_id, or run them with another --output_dir"
            )
    return list(entries.values())


def check_mpp(mpp: float) -> float:
    """Return `mpp` if it is a plausible number of um per pixel, else raise ValueError."""
    if not PLAUSIBLE_MPP[0] <= mpp <= PLAUSIBLE_MPP[1]:
        raise ValueError(f"expected {PLAUSIBLE_MPP[0]} to {PLAUSIBLE_MPP[1]:g} um/px")
    return mpp


def _told(entry: SlideEntry) -> str:
    said = {"mpp": entry.mpp, "assume_mpp": entry.assume_mpp}
    return ", ".join([entry.slide_id, *(f"{name} {value:g}" for name, value in said.items() if value is not None)])


def _check_names(entry: SlideEntry) -> None:
    """Refuse what would end the run later: a slide whose failure cannot even be recorded under its name."""
    shown = str(entry.path).encode(errors="surrogateescape").decode(errors="backslashreplace")
    mend = "rename it, or list it in a CSV with a column slide_id"
    if shown != str(entry.path):
        raise ValueError(f"--slides: the path {shown} is not in UTF-8: rename it")
    if any(unicodedata.category(letter) == "Cc" for letter in str(entry.path)):
        told = str(entry.path).encode("unicode_escape").decode()
        raise ValueError(f"--slides: the path {told} holds a control character, such as a line break: rename it")
    if len(entry.slide_id.encode()) > MAX_NAME_BYTES:
        raise ValueError(f"--slides: the name of {shown} is longer than {MAX_NAME_BYTES} bytes: {mend}")


def _entries_of(source: Path) -> list[SlideEntry]:
    if not source.exists():
        raise FileNotFoundError(f"--slides {source}: no such file or folder")
    if source.is_dir():
        found = [SlideEntry(slide_id, path.absolute()) for slide_id, path in slides_below(source)]
        if not found:
            suffixes = " ".join(sorted(WHOLE_SLIDE_SUFFIXES | IMAGE_SUFFIXES))
            raise ValueError(f"--slides {source}: no slide in this folder or below it; looked for {suffixes}")
        return found
    return _entries_of_csv(source) if source.suffix.lower() == ".csv" else [SlideEntry(source.stem, source.absolute())]


def _entries_of_csv(source: Path) -> list[SlideEntry]:
    try:
        return _read_csv(source)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"--slides {source}: is no CSV in UTF-8 ({error}): save it as one") from error


def _read_csv(source: Path) -> list[SlideEntry]:
    with source.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, delimiter=separator_of(file))
        reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
        column = next((name for name in PATH_COLUMNS if name in (reader.fieldnames or [])), None)
        if column is None:
            raise ValueError(
                f"--slides {source}: columns are {', '.join(reader.fieldnames or ['none'])}; "
                f"one of {', '.join(PATH_COLUMNS)} must name the slides"
            )
        entries = [entry for row in reader for entry in _entries_of_row(source, reader.line_num, row, column)]
    if not entries:
        raise ValueError(f"--slides {source}: no slide in its column {column}")
    return entries


def _entries_of_row(source: Path, line: int, row: dict[str, str | None], column: str) -> Iterator[SlideEntry]:
    if not (named := (row[column] or "").strip()):
        return
    path = (source.parent / Path(named).expanduser()).absolute()
    slide_id = (row.get("slide_id") or "").strip()
    if slide_id != Path(slide_id).name or slide_id == ".." or not slide_id.isprintable():
        told = slide_id.encode("unicode_escape").decode()
        raise ValueError(
            f"--slides {source}: line {line}, slide_id {told}: a name of printable characters without / is expected"
        )
    mpp, assume_mpp = (_mpp(source, line, name, row.get(name)) for name in ("mpp", "assume_mpp"))
    match (row.get("mpp_source") or "").strip():
        case "assumed":
            mpp, assume_mpp = None, assume_mpp or mpp
        case found if found in READ_FROM_SLIDE:
            mpp = None
    if not path.is_dir():
        yield SlideEntry(slide_id or path.stem, path, assume_mpp, mpp)
        return
    slides = slides_below(path)
    if len(slides) != 1:
        raise ValueError(f"--slides {source}: line {line}, {named} is a folder of {len(slides)} slides, not of one")
    yield SlideEntry(slide_id or slides[0][0], slides[0][1], assume_mpp, mpp)


def _mpp(source: Path, line: int, column: str, text: str | None) -> float | None:
    if not (text or "").strip():
        return None
    try:
        return check_mpp(float(text.replace(",", ".")))  # a decimal comma: no mpp has thousands
    except ValueError as error:
        raise ValueError(f"--slides {source}: line {line}, {column} {text}: {error}") from error
