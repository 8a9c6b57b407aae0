"""What is to be left out of annotation files, and which texts are to be replaced: --exclude and --revise."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from csv_separator import SEPARATORS
from slide_reports.annotation_files import read_rows, read_text
from slide_reports.forms import read_drafts
from slide_reports.record import slide_id_of

NAMED = 5  # examples in one line


@dataclass
class Edits:
    """Changes to records, which remember whether they were of use.

    Attributes:
        exclude: file of ids to leave out, as `listed_ids` reads it; None for none.
        revise: annotation file with new texts, as `read_revisions` reads it; None for none.
    """

    exclude: str | Path | None = None
    revise: str | Path | None = None
    _listed: dict[str, bool] = field(default_factory=dict)
    _revised: dict[tuple[str, str], str] = field(default_factory=dict)
    _used: set[tuple[str, str]] = field(default_factory=set)

    def __post_init__(self) -> None:
        if self.exclude:
            self._listed = dict.fromkeys(
                (name for listed in listed_ids(self.exclude) for name in _names_of(listed)), False
            )
        if self.revise:
            self._revised = read_revisions(self.revise)

    def leaves_out(self, record_id: str) -> bool:
        """Whether a record is to be left out."""
        found = [name for name in _names_of(record_id) if name in self._listed] if self._listed else []
        for name in found:
            self._listed[name] = True
        return bool(found)

    def text_of(self, record_id: str, question: str, answer: str) -> str:
        """The new text of a record of one turn, or the old one."""
        if not self._revised:
            return answer
        found = [(name, question) for name in _names_of(record_id) if (name, question) in self._revised]
        self._used.update(found)
        return self._revised[found[0]] if found else answer

    def unmatched(self) -> Iterator[tuple[str, int]]:
        """A line, and how many it is about, for each file that names what no record had that was read so far."""
        if self._listed:
            ids = listed_ids(self.exclude)
            unknown = [listed for listed in ids if not any(self._listed[name] for name in _names_of(listed))]
            if unknown:
                yield f"--exclude {self.exclude}: no record has the id {_named(unknown)}", len(unknown)
        unknown = {}
        for name, question in self._revised:
            if not any((form, question) in self._used for form in _names_of(name)):
                unknown.setdefault((slide_id_of(name), question), name)
        if unknown:
            told = _named(list(unknown.values()))
            yield f"--revise {self.revise}: no record of one turn has the id and the question of {told}", len(unknown)


def listed_ids(path: str | Path) -> list[str]:
    """Ids of a file: column ``id`` or ``slide_id`` of a CSV, lines of a text, or the ids of an annotation file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds no ids.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"--exclude {path}: no such file")
    if not path.stat().st_size:
        raise ValueError(f"--exclude {path}: it is empty; list ids in it, or leave the flag out")
    if path.suffix.lower() not in (".csv", ".tsv", ".txt"):
        return [draft.id for row in read_rows(path) for draft in read_drafts(row)]
    lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if path.suffix.lower() == ".txt" or not any(separator in line for line in lines for separator in SEPARATORS):
        ids = [line.strip("\"'") for line in lines]  # R quotes even a single column
        return ids[1:] if len(ids) > 1 and ids[0].lower() in ("id", "slide_id") else ids
    found = (row.values.get("id", row.values.get("slide_id")) for row in read_rows(path))
    ids = [listed.strip() for listed in found if listed]
    if not ids:
        raise ValueError(f"--exclude {path}: no column id or slide_id; name the column that holds the ids so")
    return ids


def read_revisions(path: str | Path) -> dict[tuple[str, str], str]:
    """New text of some ids, each also without the suffix of a slide, and questions, from an annotation file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is broken, or revises one id and question in two ways.
    """
    revised: dict[tuple[str, str], str] = {}
    for row in read_rows(path):
        for draft in read_drafts(row):
            question, text = draft.turns[0]
            others = {revised.setdefault((name, question), text) for name in _names_of(draft.id)} - {text}
            if len(draft.turns) > 1 or not text or others:
                raise ValueError(
                    f"{row.where} ({draft.id}): --revise takes one text for an id and question, and only one"
                )
    return revised


def _names_of(record_id: str) -> tuple[str, str]:
    """An id as it is, and without the suffix of a slide: `s1.svs`, `s1.tiff` and `s1` are one."""
    return record_id, slide_id_of(record_id)


def _named(names: list[str]) -> str:
    shown = ", ".join(names[:NAMED])
    return shown if len(names) <= NAMED else f"{shown} and {len(names) - NAMED} more"
