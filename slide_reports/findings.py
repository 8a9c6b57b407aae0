"""What is wrong with records, or odd about them: each finding is one line, and says whether training may begin."""

import os
import re
import sys
import unicodedata
from array import array
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from slide_features import FEATURE_SUFFIXES, read_slide_features, slide_id_of_features
from slide_reports.edits import Edits
from slide_reports.inputs import input_faults
from slide_reports.record import Record
from slide_reports.table import column, distinct, fields, select

WRONG, LEFT_OUT, ODD = "wrong", "left out", "odd"
NAMED = 5  # examples in one line
# control characters and the signs of a text that was decoded with the wrong table, or went through a word processor
ODD_CATEGORIES = {"Cc", "Cf", "Co", "Cn", "Zl", "Zp"}
ODD_CHARACTERS = {"\N{REPLACEMENT CHARACTER}", "\N{NO-BREAK SPACE}", "\N{LATIN CAPITAL LETTER A WITH TILDE}"}
ORDINARY = {"\n", "\t", "\r"}
ODD_ASCII = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


@dataclass(frozen=True)
class Finding:
    """Something about the records.

    Attributes:
        severity: `wrong` where training would learn something wrong, `left out` where it would go on without some
            records, `odd` where it is worth a look.
        kind: a word or two that the table at the end counts by.
        what: one line: which records, and the mend.
        count: how many records or files it is about.
    """

    severity: str
    kind: str
    what: str
    count: int = 1

    @property
    def line(self) -> str:
        """What was found, without the line ends that names may hold."""
        return " ".join(self.what.split())


def check_before_training(splits: dict[str, Sequence[Record]], edits: Edits) -> None:
    """Refuse records that training would learn something wrong from, and warn of what is odd about the others.

    It finds what `slide_reports/check.py` finds in texts, ids and patients; what it finds in inputs, training looks for
    when it opens them, see `with_inputs`. The first process alone looks for what is odd.

    Raises:
        ValueError: names what is wrong, and the mend.
    """
    refuse_wrong(splits)
    if os.environ.get("RANK", "0") == "0":
        for finding in (*unmatched_ids(edits), *find_odd(splits)):
            if finding.severity == ODD:
                print(f"warning: {finding.line}", file=sys.stderr)


def refuse_wrong(splits: dict[str, Sequence[Record]]) -> None:
    """Refuse to train where a patient is in two splits, or nothing is left to train on.

    Raises:
        ValueError: names the first of these, and the mend.
    """
    for finding in find_wrong(splits):
        raise ValueError(finding.line)


def find_all(splits: dict[str, Sequence[Record]], features_dir: Path | None) -> Iterator[Finding]:
    """Findings about records by split; feature files and images are read whole."""
    yield from find_odd(splits)
    yield from find_wrong(splits)
    inputs = [paths for part in splits.values() for paths in column(part, "inputs")]
    ids = [name for part in splits.values() for name in column(part, "id")]
    yield from bad_inputs(ids, inputs)
    if features_dir is not None:
        yield from extra_features(features_dir, {path for paths in inputs for path in paths})


def find_wrong(splits: dict[str, Sequence[Record]]) -> Iterator[Finding]:
    """What must not be trained on, found without opening an input."""
    yield from nothing_to_train_on(splits)
    yield from shared_patients(splits)
    yield from shared_inputs(splits)


def find_odd(splits: dict[str, Sequence[Record]]) -> Iterator[Finding]:
    """What is odd about texts, or left out for them, found in one pass over the records; and about their splits.

    Records that a meta file repeats are meant to be, and count once.
    """
    yield from without_split(splits)
    texts = {split: _Texts.of(distinct(records)) for split, records in splits.items()}
    for split, of_split in texts.items():
        yield from repeated_questions(of_split, split)
        yield from empty_answers(of_split, split)
        yield from odd_characters(of_split, split)
    yield from repeated_texts(texts)


@dataclass(frozen=True)
class _Texts:
    """What is kept of the texts of a split's records: of a million, as many numbers.

    Attributes:
        records: of the split.
        asked: hash of the last question and of all that comes before it, id included, int64 [N].
        answered: hash of the last answer, int64 [N].
        first_answers: hash of the first answer, int64 [N].
        empty: positions of records without any answer.
        odd: positions of the records that hold each odd character.
    """

    records: Sequence[Record]
    asked: np.ndarray
    answered: np.ndarray
    first_answers: np.ndarray
    empty: list[int]
    odd: dict[str, list[int]]

    @classmethod
    def of(cls, records: Sequence[Record]) -> "_Texts":
        empty: list[int] = []
        odd: dict[str, list[int]] = defaultdict(list)
        hashes = array("q")
        for position, (name, turns) in enumerate(fields(records, "id", "turns")):
            *before, (question, answer) = turns
            hashes.extend((hash((name, *before, question)), hash(answer), hash(turns[0][1])))
            if not any([answer for _, answer in turns]):
                empty.append(position)
            text = "".join([text for turn in turns for text in turn])
            if not text.isascii() or ODD_ASCII.search(text):
                for character in filter(_is_odd, set(text)):
                    odd[character].append(position)
        return cls(records, *np.array(hashes).reshape(-1, 3).T, empty, odd)

    def ids(self, positions: Sequence[int] | np.ndarray) -> str:
        """The first few ids of some records, and how many more there are."""
        return _named(column(select(self.records, sorted(positions)[:NAMED]), "id"), len(positions))


def unmatched_ids(edits: Edits) -> Iterator[Finding]:
    """Ids of --exclude and --revise that no record has, of all files that were read."""
    for what, count in edits.unmatched():
        yield Finding(ODD, "unknown ids", f"{what}; mend the list if that is not meant", count)


def repeated_questions(texts: _Texts, split: str) -> Iterator[Finding]:
    """One case and question with several answers; and the same record several times."""
    pairs = np.stack([texts.asked, texts.answered], axis=1)
    pairs, first, times = np.unique(pairs, axis=0, return_index=True, return_counts=True)
    _, start, answers = np.unique(pairs[:, 0], return_index=True, return_counts=True)
    torn = first[start[answers > 1]]
    if len(torn):
        what = f"{texts.ids(torn)} {'has' if len(torn) == 1 else 'have'} several answers to one question"
        yield Finding(ODD, "several answers", f"{split}: {what}", len(torn))
    alone = start[answers == 1]
    double = first[alone[times[alone] > 1]]
    if len(double):
        yield Finding(ODD, "repeated records", f"{split}: {texts.ids(double)} repeated word for word", len(double))


def empty_answers(texts: _Texts, split: str) -> Iterator[Finding]:
    """Records without an answer, which training leaves out."""
    if texts.empty:
        what = f"{split}: {texts.ids(texts.empty)} without a report"
        yield Finding(LEFT_OUT, "empty reports", what, len(texts.empty))


def odd_characters(texts: _Texts, split: str) -> Iterator[Finding]:
    """Characters that no keyboard made: control characters, and those of a wrongly decoded text."""
    for character, positions in sorted(texts.odd.items()):
        code = f"U+{ord(character):04X} {unicodedata.name(character, '')}".strip()
        what = f"{split}: {texts.ids(positions)} with {code}; mend with --revise"
        yield Finding(ODD, "odd characters", what, len(positions))


def shared_patients(splits: dict[str, Sequence[Record]]) -> Iterator[Finding]:
    """Patients in two splits: what is measured on one was learnt in the other."""
    groups = {split: set(column(records, "group")) for split, records in splits.items()}
    for first, second in _pairs(groups):
        if shared := sorted(groups[first] & groups[second]):
            what = (
                f"{_named(shared)} of {first} also in {second}; split by patient (slide_reports/split.py), or say who "
                "is a patient with --group_pattern or a field patient_id"
            )
            yield Finding(WRONG, "shared patients", what, len(shared))


def shared_inputs(splits: dict[str, Sequence[Record]]) -> Iterator[Finding]:
    """Inputs in two splits under different patients, which `shared_patients` does not see."""
    hashes = {split: _input_hashes(records) for split, records in splits.items()}
    for first, second in _pairs(hashes):
        both = set(np.intersect1d(hashes[first], hashes[second]).tolist())
        if not both:
            continue
        told = set(column(splits[first], "group")) & set(column(splits[second], "group"))
        of_second = ((paths, group) for paths, group in fields(splits[second], "inputs", "group") if group not in told)
        if shared := sorted({path for paths, _ in of_second for path in paths if hash(path) in both}):
            what = (
                f"{_named(shared)} of {first} also in {second} under another patient; give all records of a slide or "
                "image the same patient_id, or none of them one"
            )
            yield Finding(WRONG, "shared inputs", what, len(shared))


def refuse_shared_owners(records: Sequence[Record]) -> None:
    """Refuse to split records where an input is of two patients: it would fall on both sides, see `shared_inputs`.

    Raises:
        ValueError: names the inputs, and the mend.
    """
    pairs = array("q")
    for paths, group in fields(records, "inputs", "group"):
        for path in dict.fromkeys(paths):
            pairs.extend((hash(path), hash(group)))
    owned, owners = np.unique(np.unique(np.array(pairs).reshape(-1, 2), axis=0)[:, 0], return_counts=True)
    if not (torn := set(owned[owners > 1].tolist())):
        return
    shared = sorted({path for (paths,) in fields(records, "inputs") for path in paths if hash(path) in torn})
    raise ValueError(
        f"{_named(shared)} under two patients, who may fall into two splits; give all records of a slide or image the "
        "same patient_id, or none of them one"
    )


def _input_hashes(records: Sequence[Record]) -> np.ndarray:
    """Hashes of the paths of all inputs, int64 [N]: of a million records, as many numbers."""
    return np.array(
        array("q", (hash(path) for (paths,) in fields(records, "inputs") for path in paths)), dtype=np.int64
    )


def without_split(splits: dict[str, Sequence[Record]]) -> Iterator[Finding]:
    """Records of training that name no split, where others do."""
    stated = column(splits["train"], "split")
    unsaid = [position for position, split in enumerate(stated) if not split]
    if 0 < len(unsaid) < len(stated):
        ids = _named(column(select(splits["train"], unsaid[:NAMED]), "id"), len(unsaid))
        what = f"train: {ids} name no split where others do; they are trained on, unless --splits says otherwise"
        yield Finding(ODD, "without a split", what, len(unsaid))


def repeated_texts(texts: dict[str, _Texts]) -> Iterator[Finding]:
    """Texts of one split that occur word for word in another: a model that learnt them by heart knows them."""
    answers = {split: of_split.first_answers for split, of_split in texts.items()}
    for first, second in _pairs(answers):
        known = answers[first][answers[first] != hash("")]
        if repeated := int(np.isin(answers[second], known).sum()):
            count = len(answers[second])
            what = f"{repeated} of {count} texts of {second} ({repeated / count:.1%}) occur word for word in {first}"
            yield Finding(ODD, "repeated texts", f"{what}; compare scores with those of the baselines", repeated)


def bad_inputs(ids: list[str], inputs: list[list[str]]) -> Iterator[Finding]:
    """Inputs that are missing, do not open, were made differently, or hold nothing, NaN or infinity."""
    owners: dict[str, str] = {}
    for name, paths in zip(ids, inputs, strict=True):
        for path in paths:
            owners.setdefault(path, name)
    faults = input_faults(list(owners), None)
    missing = [path for path in faults if not Path(path).is_file()]
    if missing:
        yield Finding(LEFT_OUT, "missing inputs", f"{_named(missing)} missing; make them or exclude", len(missing))
    for path in sorted(faults.keys() - set(missing)):
        yield Finding(WRONG, "bad inputs", f"{owners[path]}: {faults[path]}")
    for path, name in owners.items():
        if path not in faults and (fault := _fault_inside(Path(path))):
            yield Finding(WRONG, "bad inputs", f"{name}: {fault}")


def extra_features(features_dir: Path, named: set[str]) -> Iterator[Finding]:
    """Feature files of slides that no record names; one slide may have files of several formats."""
    slides = {slide_id_of_features(path) for path in named if path.endswith(FEATURE_SUFFIXES)}
    files = (path for path in sorted(features_dir.iterdir()) if path.name.endswith(FEATURE_SUFFIXES))
    extra = [path.name for path in files if str(path) not in named and slide_id_of_features(path) not in slides]
    if extra:
        yield Finding(ODD, "extra features", f"{_named(extra)} in {features_dir} belong to no record", len(extra))


def nothing_to_train_on(splits: dict[str, Sequence[Record]]) -> Iterator[Finding]:
    """No training records, where others are there: a table of splits, or a field, gave them all away."""
    if not len(splits["train"]):
        counts = ", ".join(f"{len(part)} in {split}" for split, part in splits.items() if split != "train")
        yield Finding(WRONG, "no training records", f"no record to train on, {counts}; mend --splits or --val_fraction")


def _fault_inside(path: Path) -> str | None:
    """What is wrong with the content of an input that opens."""
    if not path.name.endswith(FEATURE_SUFFIXES):
        return _fault_of_picture(path)
    try:
        read_slide_features(path)
    except (ValueError, OSError) as error:
        return str(error)
    return None


def _fault_of_picture(path: Path) -> str | None:
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return f"{path} does not open as an image ({error}); replace it"
    return None


def _is_odd(character: str) -> bool:
    if character in ORDINARY:
        return False
    return character in ODD_CHARACTERS or unicodedata.category(character) in ODD_CATEGORIES


def _pairs(names: dict[str, object]) -> Iterator[tuple[str, str]]:
    listed = list(names)
    return ((first, second) for i, first in enumerate(listed) for second in listed[i + 1 :])


def _named(names: list[str], count: int | None = None) -> str:
    shown, count = ", ".join(names[:NAMED]), count or len(names)
    return shown if count <= NAMED else f"{shown} and {count - NAMED} more"
