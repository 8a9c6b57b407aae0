"""Records to splits. A patient is never in two; the split of a patient does not depend on who else is there."""

import csv
import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from command_line import counted
from csv_separator import separator_of
from slide_features import atomic_path
from slide_reports.annotation_files import split_of
from slide_reports.record import Record
from slide_reports.table import column, fields, select


def split_by_patient(
    records: Sequence[Record], fraction: float, seed: int
) -> tuple[Sequence[Record], Sequence[Record]]:
    """Split off about ``fraction`` of the patients: (the others, those split off).

    A patient's side depends on its name and the seed alone, so it stays when records are added.
    """
    groups = column(records, "group")
    distinct = set(groups)
    held_out = {group for group in distinct if position_of(group, seed) < fraction}
    if not held_out and fraction > 0 and len(distinct) > 1:  # a small corpus gets a validation loss all the same
        held_out = {min(distinct, key=lambda group: position_of(group, seed))}
    is_held_out = np.array([group in held_out for group in groups], dtype=bool)
    return select(records, np.nonzero(~is_held_out)[0]), select(records, np.nonzero(is_held_out)[0])


def assign_splits(
    groups: Sequence[str],
    shares: dict[str, float],
    seed: int,
    strata: Sequence[str] | None = None,
    earlier: dict[str, str] | None = None,
) -> dict[str, str]:
    """Give every patient a split.

    Without strata, a patient's split depends on its name and the seed alone. With strata, each patient counts to the
    commonest stratum of its records, the patients of a stratum are ordered by name and seed, and the shares are cut off
    that order by number of records, so that every stratum has the stated shares; a patient that `earlier` knows stays
    where it was, and new ones fill up what is short.

    Args:
        groups: the patient of each record.
        shares: of records for each split, e.g. ``{"train": 0.8, "val": 0.1, "test": 0.1}``; they add up to 1.
        seed: of the order of patients.
        strata: of each record, e.g. its organ; None does without.
        earlier: splits of patients that were assigned before, and stay.

    Returns:
        Split of each patient.

    Raises:
        ValueError: the shares do not add up to 1.
    """
    # written so that nan, of which every comparison is false, is refused too
    if not (all(share >= 0 for share in shares.values()) and abs(sum(shares.values()) - 1) <= 1e-6):
        raise ValueError(f"shares {shares} of the splits must not be negative and must add up to 1")
    earlier = {group: split for group, split in (earlier or {}).items() if split in shares}
    if strata is None:
        ends = np.cumsum(list(shares.values()))
        names = list(shares)
        free = {group for group in set(groups) if group not in earlier}
        drawn = {g: names[min(int(np.searchsorted(ends, position_of(g, seed), "right")), len(names) - 1)] for g in free}
        return drawn | {group: earlier[group] for group in set(groups) if group in earlier}
    sizes = Counter(groups)
    assigned, owed = {}, dict.fromkeys(shares, 0.0)
    for members in _by_stratum(groups, strata).values():
        assigned |= _fill_up(sorted(members, key=lambda g: position_of(g, seed)), sizes, shares, earlier, owed)
    return assigned


def fold_of(group: str, num_folds: int, seed: int) -> int:
    """Fold of a patient for cross-validation, 0 to ``num_folds`` - 1, by its name and the seed alone."""
    return int(position_of(group, seed) * num_folds)


def position_of(group: str, seed: int) -> float:
    """A patient's place in [0, 1), the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{group}".encode()).digest()[:8], "big") / 2**64


def share_seen(train: Sequence[str], test: Sequence[str]) -> float:
    """Share of test texts that occur verbatim among the training texts; 0 where there is no test text."""
    known = {text.strip() for text in train}
    return sum(text.strip() in known for text in test) / len(test) if test else 0.0


def strata_by(records: Sequence[Record], field: Callable[[str], str]) -> list[str]:
    """Stratum of each record: a field of its first answer, e.g. the organ of a report."""
    return [field(turns[0][1]) for (turns,) in fields(records, "turns")]


def write_splits(path: str | Path, assigned: dict[str, str], folds: dict[str, int]) -> None:
    """Write a CSV of patients, sorted by name: columns `group`, `split`, `fold`; atomically."""
    with atomic_path(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["group", "split", "fold"])
        writer.writerows([group, split, folds.get(group, "")] for group, split in sorted(assigned.items()))


def read_splits(path: str | Path, flag: str = "--splits") -> dict[str, str]:
    """Read the split of each patient from a table that `write_splits` wrote, or any CSV with `group` and `split`.

    ``flag`` is the one that named it, for messages.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a column is missing, a split unknown, or a patient is in two; names the file and line.
    """
    return {group: split for group, (split, _) in _read_table(path, flag).items()}


def read_fold(path: str | Path, fold: int) -> dict[str, str]:
    """Splits of one turn of a cross-validation: the patients of a fold are `val`, all others `train`.

    Patients whose split is `test` stay there: no turn sees them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: as `read_splits`; or the table has no folds, or none of this number.
    """
    table = _read_table(path)
    folds = {group: of_group for group, (_, of_group) in table.items()}
    if without := [group for group, of_group in folds.items() if not of_group]:
        some = f"{counted(len(without), 'patient')}, {without[0]} first,"
        few = some if len(without) < len(table) else "its patients"
        raise ValueError(f"--fold {fold}: --splits {path} gives {few} no fold; make it with slide_reports/split.py")
    held_out = {group for group, of_group in folds.items() if of_group == str(fold) and table[group][0] != "test"}
    if not held_out:
        known = sorted({of_group for group, of_group in folds.items() if table[group][0] != "test"}, key=_as_number)
        if not known:
            raise ValueError(f"--fold {fold}: --splits {path} has no patients but those of the split test")
        raise ValueError(f"--fold {fold}: --splits {path} has no such fold but {', '.join(known)}")
    return {
        group: "test" if split == "test" else "val" if group in held_out else "train"
        for group, (split, _) in table.items()
    }


def _as_number(text: str) -> tuple[int, str]:
    return (int(text) if text.isdecimal() else -1, text)


def _read_table(path: str | Path, flag: str = "--splits") -> dict[str, tuple[str, str]]:
    """Split and fold of each patient; an empty fold where the table has none."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{flag} {path}: no such file; slide_reports/split.py makes it")
    assigned: dict[str, tuple[str, str]] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, delimiter=separator_of(file), strict=True)
            reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
            if not {"group", "split"} <= set(reader.fieldnames):
                found = ", ".join(reader.fieldnames)[:80] or "none"
                raise ValueError(f"{flag} {path}: expected the columns group and split, found {found}")
            for row in (row for row in reader if any(row.values())):  # spreadsheets write rows of separators alone
                where = f"{flag} {path}: line {reader.line_num}"
                try:
                    # programs that hold whole numbers as fractions write 1.0
                    found = split_of(row["split"]), (row.get("fold") or "").strip().removesuffix(".0")
                except ValueError as error:
                    raise ValueError(f"{where}: {error}") from error
                group = (row["group"] or "").strip()  # as patients of records are
                if (first := assigned.setdefault(group, found)) != found:
                    what = "splits" if first[0] != found[0] else "folds"
                    raise ValueError(f"{where}: {group or 'no group'} is in two {what}; keep one line of it")
    except UnicodeDecodeError as error:
        raise ValueError(f"{flag} {path}: not in UTF-8 (byte {error.start}); save it as UTF-8") from error
    except csv.Error as error:
        raise ValueError(f"{flag} {path}: not a readable CSV ({error}); make it again") from error
    return assigned


def splits_of(records: Sequence[Record], assigned: dict[str, str], table: str | Path) -> list[str]:
    """The split of each record by its patient.

    Raises:
        ValueError: a patient is not in the table.
    """
    groups = column(records, "group")
    if missing := sorted(set(groups) - assigned.keys()):
        raise ValueError(
            f"--splits {table} lacks {counted(len(missing), 'patient')}, {missing[0]} first; add what it lacks with "
            "slide_reports/split.py --earlier"
        )
    return [assigned[group] for group in groups]


def _by_stratum(groups: Sequence[str], strata: Sequence[str]) -> dict[str, list[str]]:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for group, stratum in zip(groups, strata, strict=True):
        counts[group][stratum] += 1
    members: dict[str, list[str]] = defaultdict(list)
    for group, of_group in counts.items():
        members[max(sorted(of_group), key=of_group.__getitem__)].append(group)
    return dict(sorted(members.items()))


def _fill_up(
    ordered: list[str],
    sizes: Counter[str],
    shares: dict[str, float],
    earlier: dict[str, str],
    owed: dict[str, float],
) -> dict[str, str]:
    """Give each patient of a stratum, in order, to the split that is shortest of its share.

    Of splits equally short it is the one that is ``owed`` most records by the strata before, or the same would come off
    badly in each of many small strata. What this stratum owes is added.
    """
    total = sum(sizes[group] for group in ordered)
    short = {name: share * total for name, share in shares.items()}
    assigned = {group: earlier[group] for group in ordered if group in earlier}
    for group, split in assigned.items():
        short[split] -= sizes[group]
    for group in ordered:
        if group not in assigned:
            split = assigned[group] = max(shares, key=lambda name: (short[name], owed[name]))
            short[split] -= sizes[group]
    for name in shares:
        owed[name] += short[name]
    return assigned
