"""Files of reports: read, and everything odd in them counted instead of dropped."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from command_line import is_utf8


@dataclass
class Reports:
    """Texts by id, the records they came from, and the ids of what was odd.

    `problems` has, each a list of ids: `duplicates` (the first record of an id counts), `not_text` (None, a number,
    NaN, a list, half a surrogate pair: read as empty text) and `empty` (nothing but blanks).
    """

    texts: dict[str, str]
    records: dict[str, dict[str, Any]]
    problems: dict[str, list[str]] = field(default_factory=dict)


def read_reports(path: Path, part: str) -> Reports:
    """Read reports from JSON: `[{"id", "report"}]`, `{"id": "report"}`, `{"id": ["report"]}`, or R2Gen's parts.

    `part` is the key taken of an R2Gen file. Raises FileNotFoundError, or ValueError naming the file, the record and
    what would do; a record with an odd text is kept and counted.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: {'a folder; name the JSON file in it' if path.is_dir() else 'no such file'}")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_Object)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}); give a UTF-8 JSON list of {{'id', 'report'}}") from None
    if isinstance(content, dict) and isinstance(content.get("train"), list):
        if part not in content:
            raise ValueError(f"{path}: an R2Gen file without a {part!r} part; it has {', '.join(content)}")
        content = content[part]
    repeated: list[str] = []
    if isinstance(content, _Object):
        repeated = content.repeated
        content = [_Object([("id", key), ("report", value)]) for key, value in content.items()]
    if not isinstance(content, list) or not content:
        raise ValueError(f"{path}: holds no records; give a JSON list of {{'id', 'report'}}")

    reports = Reports({}, {}, {"duplicates": repeated, "not_text": [], "empty": []})
    for index, record in enumerate(content):
        key = _id_of(record, f"{path}: record {index}")
        if key in reports.texts:
            reports.problems["duplicates"].append(key)
            continue
        text = _text_of(record["report"])
        if text is None:
            reports.problems["not_text"].append(key)
        elif not text.strip():
            reports.problems["empty"].append(key)
        reports.texts[key] = text or ""
        reports.records[key] = record
    return reports


class _Object(dict[str, Any]):
    """An object of JSON: of a key that it has several times the first counts, and `repeated` names it."""

    def __init__(self, pairs: Sequence[tuple[str, Any]]):
        super().__init__()
        self.repeated: list[str] = []
        for key, value in pairs:
            if key in self:
                self.repeated.append(key)
            else:
                self[key] = value


def _id_of(record: Any, where: str) -> str:
    if not isinstance(record, _Object) or "id" not in record or "report" not in record:
        raise ValueError(f"{where} is not {{'id', 'report'}}; give it both keys")
    if record.repeated:
        raise ValueError(f"{where} has {record.repeated[0]!r} twice; keep one")
    key = record["id"]
    if isinstance(key, bool) or not isinstance(key, str | int) or not str(key).strip() or not is_utf8(str(key)):
        raise ValueError(f"{where}: id is {key!r}; give a string")
    return str(key)


def _text_of(report: Any) -> str | None:
    """The text of a report, or None where it is not one."""
    if isinstance(report, list) and len(report) == 1:  # the form of coco-style score files
        report = report[0]
    return report if isinstance(report, str) and is_utf8(report) else None


@dataclass
class PairedReports:
    """Predictions beside references, in the order of the references, and what did not fit.

    A missing or unusable prediction is an empty text. A reference that is no text cannot be scored against and is left
    out. `problems` maps each kind of oddity to ids.
    """

    ids: list[str]
    hypotheses: list[str]
    references: list[str]
    problems: dict[str, list[str]]

    @property
    def has_failures(self) -> bool:
        """Whether anything was missing or unusable; extra predictions are not."""
        return any(ids for kind, ids in self.problems.items() if kind not in ("extra_predictions", "empty_references"))


def pair_reports(predictions: Reports, references: Reports, where: str) -> PairedReports:
    """Pair by id. ValueError, beginning with `where`, when not one id is in both, or no reference is a text."""
    if not predictions.texts.keys() & references.texts.keys():
        raise ValueError(
            f"{where}: not one id of the references ({shown(list(predictions.texts), 2)} against "
            f"{shown(list(references.texts), 2)}); are these files of the same run?"
        )
    unusable = set(references.problems["not_text"])
    ids = [key for key in references.texts if key not in unusable]
    if not ids:
        raise ValueError(f"{where}: not one reference is a text")
    missing = [key for key in ids if key not in predictions.texts]
    problems = {
        "missing_predictions": missing,
        "extra_predictions": [key for key in predictions.texts if key not in references.texts],
        "empty_predictions": [key for key in predictions.problems["empty"] if key in references.texts],
        "predictions_not_text": predictions.problems["not_text"],
        "duplicate_predictions": predictions.problems["duplicates"],
        "empty_references": references.problems["empty"],
        "references_not_text": references.problems["not_text"],
        "duplicate_references": references.problems["duplicates"],
    }
    hypotheses = [predictions.texts.get(key, "") for key in ids]
    return PairedReports(ids, hypotheses, [references.texts[key] for key in ids], problems)


WHAT_WAS_DONE = {
    "missing_predictions": "references have no prediction and were scored as empty text",
    "extra_predictions": "predictions have no reference and were left out",
    "empty_predictions": "predictions are empty",
    "predictions_not_text": "predictions are not text and were scored as empty text",
    "duplicate_predictions": "predictions repeat an id; the first of each was scored",
    "empty_references": "references are empty",
    "references_not_text": "references are not text and were left out",
    "duplicate_references": "references repeat an id; the first of each was used",
}


def shown(ids: Sequence[str], number: int = 5) -> str:
    """First few ids of a list, for a message."""
    names = (key if key.isprintable() and key == key.strip() else repr(key) for key in ids[:number])
    return ", ".join(names) + (", …" if len(ids) > number else "")


def finite(value: Any) -> float | None:
    """A number of a record as a float, or None for anything that is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
