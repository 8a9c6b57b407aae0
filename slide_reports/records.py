"""Annotation files to records: every known form, cleaned of what is to be left out, and split for training."""

import hashlib
import math
import os
import re
import sys
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt
from tqdm import tqdm

from slide_reports.annotation_files import BLANKS, decode_json, pictures_folder, read_rows, read_text
from slide_reports.edits import Edits
from slide_reports.findings import check_before_training
from slide_reports.forms import Draft, read_drafts
from slide_reports.inputs import check_input, with_inputs
from slide_reports.paths import Folders, GivenSlides, JustNames
from slide_reports.record import Record, patient_of
from slide_reports.splits import read_fold, read_splits, split_by_patient, splits_of
from slide_reports.table import RecordTable, column, fields, select

META_FIELDS = {"root", "annotation"}


def read_records(
    annotation: str | Path,
    *,
    features_dir: str | Path | None = None,
    image_root: str | Path | None = None,
    group_pattern: str | None = None,
    exclude: str | Path | None = None,
    revise: str | Path | None = None,
    edits: Edits | None = None,
    locate_inputs: bool = True,
    slides: Mapping[str, Path] | None = None,
) -> RecordTable:
    """Read records of any known form (`slide_reports.forms` lists them), told apart by content.

    Args:
        annotation: JSON, JSON lines, CSV, TSV or Parquet file; InternVL's meta file, which names several with their
            roots; a folder that the library `datasets` saved, or the name of a dataset on the hub.
        features_dir: folder of ``<slide_id>.h5`` (or ``.zarr.zip``, or ``.pt`` as CLAM's).
        image_root: folder that images are relative to.
        group_pattern: regular expression that finds the patient in an id or image name, see `patient_of`.
        exclude: file of ids to leave out, see `listed_ids`.
        revise: annotation file with new texts for some ids, each for the same question or for none.
        edits: both of them together, where it is of interest which of them were of use.
        locate_inputs: find the files that records name; without, they have the names as they stand.
        slides: paths by slide_id; where given, records name these, not feature files.

    Raises:
        FileNotFoundError: no such annotation file or root.
        ValueError: the form is unknown or a record is broken; names the file, the record and the mend.
    """
    try:
        re.compile(group_pattern or "")
    except re.error as error:
        raise ValueError(f"--group_pattern {group_pattern!r} is no regular expression ({error})") from error
    for name, root in (("--features_dir", features_dir), ("--image_root", image_root)):
        if root is not None and not Path(root).is_dir():
            raise FileNotFoundError(f"{name} {root}: no such folder")
    roots = (None if root is None else Path(root) for root in (features_dir, image_root))
    folders: Folders | GivenSlides | JustNames = JustNames()
    if locate_inputs:
        folders = Folders(*roots, pictures_folder())
    if slides is not None:
        folders = GivenSlides(slides)
    edits = edits or Edits(exclude, revise)
    repetitions = array("q")
    table = RecordTable.of(_records(Path(annotation), folders, group_pattern, edits, repetitions))
    if not len(table):
        besides = " but excluded ones" if edits.exclude else ""
        raise ValueError(f"{annotation}: expected at least one record, found none{besides}")
    return table.select(np.repeat(np.arange(len(table)), repetitions))


def _records(
    annotation: Path,
    folders: Folders | GivenSlides | JustNames,
    group_pattern: str | None,
    edits: Edits,
    repetitions: array,
) -> Iterator[Record]:
    """Each record once; how often a meta file repeats it is appended to ``repetitions``."""
    for source, in_folders, times in annotation_sources(annotation, folders):
        rows = tqdm(read_rows(source), desc=f"reading {source.name}", unit="record", delay=5, leave=False)
        for row in rows:
            for draft in read_drafts(row):
                if edits.leaves_out(draft.id):
                    continue
                repetitions.append(times)
                yield _record(row.where, draft, in_folders, group_pattern, edits)


def _record(
    where: str, draft: Draft, folders: Folders | GivenSlides | JustNames, group_pattern: str | None, edits: Edits
) -> Record:
    inputs = tuple(folders.locate(where, draft.kind, name) for name in draft.names)
    group = draft.group or patient_of(draft.case, group_pattern)
    (question, answer), *later = draft.turns
    if not later:
        answer = edits.text_of(draft.id, question, answer)
    return Record(draft.id, inputs, question, answer, group, draft.split, tuple(later))


def annotation_sources(
    annotation: Path, folders: Folders | GivenSlides | JustNames | None = None
) -> Iterator[tuple[Path, Folders | GivenSlides | JustNames | None, int]]:
    """The annotation file itself, or those that an InternVL meta file names, with their roots and repetitions.

    Raises:
        ValueError: an entry of the meta file is broken, or leaves the meta file's folder.
    """
    meta = _read_meta(annotation)
    if meta is None:
        yield annotation, folders, 1
        return
    for name, entry in meta.items():
        where = f"{annotation}: {name!r}"
        times = entry.get("repeat_time", 1)
        if not isinstance(times, int | float) or isinstance(times, bool) or not 1 <= times < 1e6 or times % 1:
            raise ValueError(f"{where} has repeat_time {times!r}; expected a whole number from 1 to 999999")
        root, file = (_beside(annotation, where, entry.get(key), key) for key in ("root", "annotation"))
        if not file.is_file():
            raise FileNotFoundError(f"{where} names {file}, which does not exist")
        own = folders
        if isinstance(folders, Folders):
            own = Folders(folders.features_dir or root, folders.image_root or root, folders.free)
        elif isinstance(folders, JustNames):
            own = JustNames(root)
        yield file, own, int(times)


def _read_meta(annotation: Path) -> dict[str, Any] | None:
    """The entries of an InternVL meta file; None if this is another file."""
    if not annotation.is_file() or annotation.suffix.lower() != ".json":
        return None
    with annotation.open(encoding="utf-8-sig", errors="replace") as file:
        if not file.read(64).lstrip().startswith("{"):
            return None
    text = read_text(annotation)
    value, end = decode_json(annotation, text, BLANKS.match(text).end(), "the file")
    entries = value.values() if isinstance(value, dict) and not text[end:].strip() else ()
    if not entries or not all(isinstance(entry, dict) and META_FIELDS <= entry.keys() for entry in entries):
        return None
    return value


def _beside(annotation: Path, where: str, name: object, key: str) -> Path:
    """A path of a meta file, relative to the meta file's folder, and inside it."""
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"{where} has {repr(name)[:60]} under {key!r}; expected a path")
    path = annotation.parent / name
    if not path.resolve().is_relative_to(annotation.parent.resolve()):
        raise ValueError(
            f"{where} names {name[:80]!r} under {key!r}, which lies outside {annotation.parent} (links are followed); "
            "put the meta file into a folder that holds all its sets"
        )
    return path


# The flags of :func:`add_data_arguments`, and the seed, that :func:`read_training_records` takes.
RECORD_FLAGS = (
    *("train_json", "val_json", "val_fraction", "seed", "splits", "fold"),
    *("features_dir", "image_root", "group_pattern", "exclude", "revise"),
)


def records_digest(records: Sequence[Record]) -> str:
    """SHA-256 of ids, questions and answers, in order: tells a changed annotation file."""
    digest = hashlib.sha256()
    for name, turns in fields(records, "id", "turns"):
        texts = (text for turn in turns for text in turn)
        digest.update("\0".join((name, *texts, "")).encode())
    return digest.hexdigest()


def digests(train_records: Sequence[Record], val_records: Sequence[Record]) -> dict[str, str]:
    """Of records and validation records, and of the files that training reads: tell data from other data."""
    return {
        "records": records_digest(train_records),
        "inputs": inputs_digest(train_records),
        "val_records": records_digest(val_records),
    }


def inputs_digest(records: Sequence[Record], max_files: int = 10_000, max_read: int = 64) -> str:
    """SHA-256 of an even sample of the records' input files: names and sizes, and of a few their first 64 KiB.

    Tells features that were made anew, or other images, wherever they lie now.
    """
    inputs = sorted({path for (paths,) in fields(records, "inputs") for path in paths}, key=os.path.basename)
    stride = max(1, math.ceil(len(inputs) / max_files))
    sizes = [(Path(path), os.path.getsize(path)) for path in inputs[::stride] if os.path.isfile(path)]
    digest = hashlib.sha256(str([(path.name, size) for path, size in sizes]).encode())
    for path, _ in sizes[:: max(1, math.ceil(len(sizes) / max_read))]:
        with path.open("rb") as file:
            digest.update(file.read(2**16))
    return digest.hexdigest()


def read_training_records(
    train_json: str,
    val_json: str | None,
    *,
    val_fraction: float,
    seed: int,
    expected: dict[str, Any] | None = None,
    splits: str | None = None,
    fold: int | None = None,
    **reading: str | None,
) -> tuple[Sequence[Record], Sequence[Record], list[str]]:
    """Training records, validation records, and a line for each record left out because something of it is missing.

    Validation is ``val_json``, else the records whose split says ``val``, else patients split off; records without a
    split among others with one are for training. ``splits`` is a table that ``slide_reports/split.py`` wrote, and
    stands for what the records say; of its folds ``fold`` is validation and the others training. ``expected`` says how
    feature files must have been made, as for :func:`with_inputs`, and ``reading`` is for :func:`read_records`.

    Raises:
        FileNotFoundError: an annotation file or folder is missing.
        ValueError: an annotation file is broken, a patient in two splits, or no record is left to train on.
    """
    if reading.get("features_dir") and reading.get("image_root"):
        raise ValueError(
            "--features_dir is for slides and --image_root for images; a model takes one: give one of them"
        )
    edits = Edits(reading.pop("exclude", None), reading.pop("revise", None))
    found = read_splits_of_training(
        train_json,
        val_json,
        None,
        val_fraction=val_fraction,
        seed=seed,
        splits=splits,
        fold=fold,
        edits=edits,
        **reading,
    )
    if not len(found["train"]):
        taken = f" beside {len(found['val'])} for validation; lower --val_fraction" if len(found["val"]) else ""
        raise ValueError(f"{train_json}: no record is left to train on{taken or '; no split of its records is train'}")
    check_before_training(found, edits)
    train, problems = with_inputs(found["train"], expected)
    if len(train) and not expected:
        expected = check_input(train[0].inputs[0], {})
    val, val_problems = with_inputs(found["val"], expected)
    if not len(train):
        why = f" ({problems[0]})" if problems else ""
        raise ValueError(f"{train_json}: no record to train on{why}; check --features_dir or --image_root")
    return train, val, problems + val_problems


def read_splits_of_training(
    train_json: str,
    val_json: str | None,
    test_json: str | None,
    *,
    val_fraction: float,
    seed: int,
    splits: str | None = None,
    fold: int | None = None,
    **reading: str | None,
) -> dict[str, Sequence[Record]]:
    """Records for ``train``, ``val`` and ``test``, as :func:`read_training_records` tells them apart."""
    if fold is not None and splits is None:
        raise ValueError(
            f"--fold {fold}: say with --splits which table holds the folds; slide_reports/split.py makes it"
        )
    if fold is not None and val_json:
        raise ValueError(f"--fold {fold} and --val_json {val_json} both say what validation is: give one of them")
    assigned = None if splits is None else read_splits(splits) if fold is None else read_fold(splits, fold)
    records = read_records(train_json, **reading)
    stated = column(records, "split") if assigned is None else splits_of(records, assigned, splits)
    if val_json:
        train, val = _of_split(records, stated, "", "train"), read_records(val_json, **reading)
    elif any(stated):
        train, val = _of_split(records, stated, "", "train"), _of_split(records, stated, "val")
    else:
        train, val = split_by_patient(records, val_fraction, seed)
    test = read_records(test_json, **reading) if test_json else _of_split(records, stated, "test")
    _tell_left_out(stated, {"val": val_json, "test": test_json})
    return {"train": train, "val": val, "test": test}


def _tell_left_out(stated: list[str], instead: dict[str, str | None]) -> None:
    """Say of how many records of ``--train_json`` another file takes the place, by split."""
    if os.environ.get("RANK", "0") != "0":
        return
    for split, file in instead.items():
        if file and (count := stated.count(split)):
            print(
                f"warning: {count:,} of the {len(stated):,} records of --train_json are of the split {split} and left "
                f"out, since --{split}_json {file} stands in their place",
                file=sys.stderr,
            )


def _of_split(records: Sequence[Record], stated: list[str], *names: str) -> Sequence[Record]:
    return select(records, [position for position, split in enumerate(stated) if split in names])


def add_record_arguments(parser) -> Any:
    """Flags about records and their inputs, the same wherever something is trained; the group that they are in."""
    group = parser.add_argument_group("Data")
    group.add_argument(
        "--train_json",
        required=True,
        help="training records in any form that docs/records.md lists: JSON, JSON lines, CSV, Parquet, an InternVL "
        "meta file, a folder saved by datasets, or a dataset on the hub",
    )
    group.add_argument("--val_json", default=None, help="validation records; default: patients split off --train_json")
    group.add_argument(
        "--val_fraction",
        type=ClosedUnitInterval,
        default=0.1,
        help="share of patients to split off without --val_json; 0 for no validation",
    )
    group.add_argument("--features_dir", default=None, help="folder of stage 0's <slide_id>.h5, for slide reports")
    group.add_argument(
        "--image_root", default=None, help="folder that `image` in the records is relative to, for images"
    )
    group.add_argument(
        "--splits",
        default=None,
        help="table of patients' splits that slide_reports/split.py wrote; default: what the records say",
    )
    group.add_argument(
        "--fold",
        type=NonNegativeInt,
        default=None,
        help="fold of the table --splits, from 0, to validate on, and to train on all others; patients of the split "
        "test stay out; default: the splits of the table",
    )
    group.add_argument(
        "--group_pattern",
        default=None,
        help="regular expression that finds the patient in an id: its first group, or the match; default: REG and TCGA "
        "names; a field patient_id comes first",
    )
    group.add_argument("--exclude", default=None, help="CSV, text or annotation file with ids to leave out")
    group.add_argument(
        "--revise", default=None, help="annotation file with new texts for some ids, with the same questions"
    )
    return group


def add_data_arguments(parser) -> None:
    """Flags about records, their inputs, and their questions and answers, the same in every stage with an LLM."""
    group = add_record_arguments(parser)
    group.add_argument(
        "--question", default=None, help="asked where a record has no question; default: one for slides, one for images"
    )
    group.add_argument(
        "--max_question_tokens",
        "--max_q_len",
        type=PositiveInt,
        default=None,
        help="longer questions lose their end; default: 128, in stage 2 as in stage 1",
    )
    group.add_argument(
        "--max_answer_tokens",
        "--max_a_len",
        type=PositiveInt,
        default=None,
        help="longer answers lose their end; default: 512, in stage 2 as in stage 1",
    )
