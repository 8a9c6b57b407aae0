"""Records with class labels, from reports by their fields or from a table of id and label, split by patient."""

import csv
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from csv_separator import separator_of
from evaluation.fields import FIELD_NAMES, ReportFields, parse_all
from slide_reports import Record, read_records, records_digest, split_by_patient
from slide_reports.edits import Edits
from slide_reports.findings import check_before_training, refuse_wrong
from slide_reports.paths import Folders
from slide_reports.record import patient_of, slide_id_of
from slide_reports.records import read_splits_of_training
from slide_reports.splits import read_fold, read_splits, splits_of
from slide_reports.table import RecordTable, column, fields, select

UNLABELLED = -100  # no class, as torch.nn.functional.cross_entropy ignores it
TABLE_LABEL = "label"
# The systems that pathologists grade in; a report states one of them, and the first stated is its grade.
GRADES = ("grade_group", "nottingham_grade", "neuroendocrine_grade", "cin", "who_grade", "dysplasia", "nuclear_grade")
GRADES += ("differentiation",)
LABEL_NAMES = ("diagnosis", "grade", *FIELD_NAMES)


@dataclass(frozen=True)
class LabelledRecords:
    """Records and their classes.

    Attributes:
        records: N of them.
        labels: (N, L) int64, the class of each record for each label, `UNLABELLED` where it has none.
    """

    records: Sequence[Record]
    labels: np.ndarray


def label_of(report: ReportFields, name: str) -> str | None:
    """What a report says of one label, None where it says nothing.

    ``diagnosis`` is the first diagnosis, ``grade`` the first grade with its system (``grade_group 4``), and all others
    are fields of :class:`evaluation.fields.ReportFields`; of a field with several values all of them together.
    """
    if name == "diagnosis":
        return report.diagnoses[0] if report.diagnoses else None
    if name == "grade":
        stated = ((system, getattr(report, system)) for system in GRADES)
        return next((f"{system} {value}" for system, value in stated if value is not None), None)
    value = getattr(report, name)
    if isinstance(value, tuple):
        return ", ".join(value) or None
    return None if value in (None, "") else str(value)


def is_label_table(path: str | Path) -> bool:
    """Whether a file is a CSV with the columns ``id`` and ``label``, not an annotation file."""
    path = Path(path)
    if not path.is_file() or path.suffix.lower() not in (".csv", ".tsv"):
        return False
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        return {"id", TABLE_LABEL} <= set(next(csv.reader(file, delimiter=separator_of(file)), []))


def read_labelled(
    train_json: str,
    val_json: str | None,
    label_names: Sequence[str],
    *,
    val_fraction: float,
    seed: int,
    splits: str | None = None,
    fold: int | None = None,
    min_class_patients: int = 1,
    **reading: Any,
) -> tuple[LabelledRecords, LabelledRecords, dict[str, list[str]]]:
    """Training and validation records with their classes, and the classes of each label in order.

    The records are split as in stages 1 and 2. Classes are those of the training records; rarer ones than
    ``min_class_patients`` and those that only validation has are no classes, and a record without any is left out.

    Args:
        train_json: annotation file with reports, or a CSV of ``id`` and ``label`` (and ``group``, ``split``).
        val_json: of validation; None splits patients off.
        label_names: of `LABEL_NAMES`; of a CSV they are not looked at.
        val_fraction: share of patients to split off.
        seed: of that split.
        splits: table of patients' splits.
        fold: of that table, to validate on.
        min_class_patients: patients that a class has in training at least.
        **reading: ``features_dir``, ``image_root``, ``group_pattern``, ``exclude``, ``revise``.

    Raises:
        FileNotFoundError: a file or folder is missing.
        ValueError: a file is broken, a patient on both sides, a label unknown, or no label has two classes.
    """
    by = {"val_fraction": val_fraction, "seed": seed, "splits": splits, "fold": fold}
    if is_label_table(train_json):
        found = dict(zip(("train", "val"), _read_tables(train_json, val_json, reading, **by), strict=True))
        refuse_wrong(found)
        label_names = (TABLE_LABEL,)
    else:
        if unknown := [name for name in label_names if name not in LABEL_NAMES]:
            raise ValueError(f"--labels {unknown[0]}: no field of reports; expected of {', '.join(LABEL_NAMES)}")
        edits = Edits(reading.pop("exclude", None), reading.pop("revise", None))
        found = read_splits_of_training(train_json, val_json, None, edits=edits, **by, **reading)
        check_before_training(found, edits)
    train, val = found["train"], found["val"]
    texts = [_texts(records, label_names) for records in (train, val)]
    classes = {
        name: _classes([row[number] for row in texts[0]], column(train, "group"), min_class_patients)
        for number, name in enumerate(label_names)
    }
    if not any(len(names) > 1 for names in classes.values()):
        counts = ", ".join(f"{name} has {len(names)}" for name, names in classes.items())
        raise ValueError(f"{train_json}: at least one label needs two classes, but {counts} of the training records")
    return _labelled(train, texts[0], classes), _labelled(val, texts[1], classes), classes


def labels_digest(cases: LabelledRecords) -> str:
    """SHA-256 of ids, reports and classes, in order: tells other labels."""
    return hashlib.sha256(records_digest(cases.records).encode() + cases.labels.tobytes()).hexdigest()


def _texts(records: Sequence[Record], label_names: Sequence[str]) -> list[tuple[str | None, ...]]:
    reports = [turns[0][1] for (turns,) in fields(records, "turns")]
    if tuple(label_names) == (TABLE_LABEL,):
        return [(report or None,) for report in reports]
    parsed = parse_all(reports)
    return [tuple(label_of(parsed[report], name) for name in label_names) for report in reports]


def _classes(texts: Sequence[str | None], groups: Sequence[str], min_patients: int) -> list[str]:
    patients = Counter(text for text, _ in {(text, group) for text, group in zip(texts, groups, strict=True)})
    return sorted(text for text, count in patients.items() if text is not None and count >= min_patients)


def _labelled(records: Sequence[Record], texts: list[tuple], classes: dict[str, list[str]]) -> LabelledRecords:
    numbers = [{text: number for number, text in enumerate(names)} for names in classes.values()]
    rows = [[of.get(text, UNLABELLED) for of, text in zip(numbers, row, strict=True)] for row in texts]
    labels = np.array(rows, dtype=np.int64).reshape(-1, len(classes))
    kept = np.nonzero((labels != UNLABELLED).any(axis=1))[0]
    return LabelledRecords(select(records, kept), labels[kept])


def _read_tables(
    train_csv: str, val_csv: str | None, reading: dict[str, Any], *, val_fraction, seed, splits, fold
) -> tuple[Sequence[Record], Sequence[Record]]:
    if val_csv and fold is not None:
        raise ValueError(f"--fold {fold} and --val_json {val_csv} both say what validation is: give one of them")
    if reading.get("exclude") or reading.get("revise"):
        raise ValueError(f"--exclude and --revise are for annotation files; {train_csv} is a table of labels: edit it")
    records = read_label_table(train_csv, **reading)
    if val_csv:
        val = read_label_table(val_csv, **reading) if is_label_table(val_csv) else read_records(val_csv, **reading)
        return records, val
    if splits is not None:
        stated = splits_of(records, read_splits(splits) if fold is None else read_fold(splits, fold), splits)
    else:
        stated = column(records, "split")
    if not any(stated):
        return split_by_patient(records, val_fraction, seed)
    return tuple(select(records, [n for n, split in enumerate(stated) if split == name]) for name in ("train", "val"))


def read_label_table(
    path: str | Path,
    *,
    features_dir: str | Path | None = None,
    image_root: str | Path | None = None,
    group_pattern: str | None = None,
    **_: Any,
) -> RecordTable:
    """Records of a CSV with the columns ``id`` and ``label``; ``group`` (the patient) and ``split`` if it has them.

    ``id`` names an image below ``image_root``, or a slide whose file is in ``features_dir``.

    Raises:
        ValueError: a row has no id or label, names it twice, or leads out of its folder.
    """
    path = Path(path)
    folders = Folders(*(None if root is None else Path(root) for root in (features_dir, image_root)))
    kind = "image" if image_root else "slide"
    records: dict[str, Record] = {}
    for number, row in enumerate(_rows_of(path), start=2):
        where, name = f"{path}: line {number}", (row.get("id") or "").strip()
        label = (row.get(TABLE_LABEL) or "").strip()
        if not name or not label:
            raise ValueError(f"{where} has no {'id' if not name else TABLE_LABEL}; give each row both")
        if name in records:
            raise ValueError(f"{where}: id {name!r} occurs a second time; give it one label")
        group = (row.get("group") or "").strip() or patient_of(slide_id_of(name), group_pattern)
        inputs = (folders.locate(where, kind, name),)
        records[name] = Record(name, inputs, "", label, group, (row.get("split") or "").strip().lower())
    if not records:
        raise ValueError(f"{path}: holds no rows; give at least one id with its label")
    return RecordTable.of(iter(records.values()))


def _rows_of(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return list(csv.DictReader(file, delimiter=separator_of(file)))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not in UTF-8 (byte {error.start}); save it as UTF-8") from error
