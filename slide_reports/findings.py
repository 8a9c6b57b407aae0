"""What is wrong with records, or odd about them: each finding is one line, and says whether training may begin."""

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from slide_features import FEATURE_SUFFIXES, read_slide_features
from slide_reports.edits import Edits
from slide_reports.inputs import input_faults
from slide_reports.record import Record
from slide_reports.table import column, fields

WRONG, LEFT_OUT, ODD = "wrong", "left out", "odd"
NAMED = 5  # examples in one line
# control characters and the signs of a text that was decoded with the wrong table, or went through a word processor
ODD_CATEGORIES = {"Cc", "Cf", "Co", "Cn", "Zl", "Zp"}
ODD_CHARACTERS = {"\N{REPLACEMENT CHARACTER}", "\N{NO-BREAK SPACE}", "\N{LATIN CAPITAL LETTER A WITH TILDE}"}
ORDINARY = {"\n", "\t", "\r"}


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


def find_all(splits: dict[str, Sequence[Record]], features_dir: Path | None) -> Iterator[Finding]:
    """Findings about records by split; feature files and images are read whole."""
    records = [(split, part) for split, part in splits.items() if len(part)]
    for split, part in records:
        yield from repeated_questions(part, split)
        yield from empty_answers(part, split)
        yield from odd_characters(part, split)
    yield from nothing_to_train_on(splits)
    yield from shared_patients(splits)
    yield from repeated_texts(splits)
    inputs = [paths for _, part in records for paths in column(part, "inputs")]
    ids = [name for _, part in records for name in column(part, "id")]
    yield from bad_inputs(ids, inputs)
    if features_dir is not None:
        yield from extra_features(features_dir, {path for paths in inputs for path in paths})


def unmatched_ids(edits: Edits) -> Iterator[Finding]:
    """Ids of --exclude and --revise that no record has, of all files that were read."""
    for what, count in edits.unmatched():
        yield Finding(ODD, "unknown ids", f"{what}; mend the list if that is not meant", count)


def repeated_questions(records: Sequence[Record], split: str) -> Iterator[Finding]:
    """One case and question with several answers; and the same record several times."""
    answers: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for name, turns in fields(records, "id", "turns"):
        *before, (question, answer) = turns
        answers[name, *(text for turn in before for text in turn), question][answer] += 1
    torn = [key[0] for key, found in answers.items() if len(found) > 1]
    if torn:
        what = f"{_named(torn)} {'has' if len(torn) == 1 else 'have'} several answers to one question"
        yield Finding(ODD, "several answers", f"{split}: {what}", len(torn))
    double = [key[0] for key, found in answers.items() if len(found) == 1 and sum(found.values()) > 1]
    if double:
        yield Finding(ODD, "repeated records", f"{split}: {_named(double)} repeated word for word", len(double))


def empty_answers(records: Sequence[Record], split: str) -> Iterator[Finding]:
    """Records without an answer, which training leaves out."""
    rows = fields(records, "id", "turns")
    empty = [name for name, turns in rows if not any(answer for _, answer in turns)]
    if empty:
        yield Finding(LEFT_OUT, "empty reports", f"{split}: {_named(empty)} without a report", len(empty))


def odd_characters(records: Sequence[Record], split: str) -> Iterator[Finding]:
    """Characters that no keyboard made: control characters, and those of a wrongly decoded text."""
    found: dict[str, list[str]] = defaultdict(list)
    for name, turns in fields(records, "id", "turns"):
        text = "".join(text for turn in turns for text in turn)
        if not text.isascii() or not text.isprintable():
            for character in {character for character in text if _is_odd(character)}:
                found[character].append(name)
    for character, names in sorted(found.items()):
        code = f"U+{ord(character):04X} {unicodedata.name(character, '')}".strip()
        yield Finding(ODD, "odd characters", f"{split}: {_named(names)} with {code}; mend with --revise", len(names))


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


def repeated_texts(splits: dict[str, Sequence[Record]]) -> Iterator[Finding]:
    """Texts of one split that occur word for word in another: a model that learnt them by heart knows them."""
    texts = {split: [turns[0][1] for (turns,) in fields(records, "turns")] for split, records in splits.items()}
    for first, second in _pairs(texts):
        known = set(texts[first]) - {""}
        if repeated := sum(text in known for text in texts[second]):
            share = repeated / len(texts[second])
            what = f"{repeated} of {len(texts[second])} texts of {second} ({share:.1%}) occur word for word in {first}"
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
    """Feature files that no record names."""
    files = (path for path in sorted(features_dir.iterdir()) if path.name.endswith(FEATURE_SUFFIXES))
    extra = [path.name for path in files if str(path) not in named]
    if extra:
        yield Finding(ODD, "extra features", f"{_named(extra)} in {features_dir} belong to no record", len(extra))


def nothing_to_train_on(splits: dict[str, Sequence[Record]]) -> Iterator[Finding]:
    """No training records, where others are there: a table of splits, or a field, gave them all away."""
    if not len(splits["train"]):
        counts = ", ".join(f"{len(part)} in {split}" for split, part in splits.items() if split != "train")
        yield Finding(WRONG, "no training records", f"no record to train on, {counts}; mend --splits or --val_fraction")


def refuse_leaks(train: Sequence[Record], val: Sequence[Record]) -> None:
    """Refuse to train where a patient of validation is in training as well.

    Raises:
        ValueError: names such patients.
    """
    for finding in shared_patients({"training": train, "validation": val}):
        raise ValueError(finding.what)


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


def _named(names: list[str]) -> str:
    shown = ", ".join(names[:NAMED])
    return shown if len(names) <= NAMED else f"{shown} and {len(names) - NAMED} more"
