r"""Split records by patient into training, validation and test, and into folds.

    python slide_reports/split.py --train_json reports.json --output splits.csv --stratify organ

writes a table of patients with columns group, split and fold, which training takes as --splits. Without --stratify a
patient's split depends on its name and the seed alone. With it, every stratum gets the stated shares; to add records
later and keep every patient where it is, name the first table with --earlier.
"""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from command_line import DONE, check_output_file, counted, make_parser, run
from slide_reports.annotation_files import read_rows
from slide_reports.findings import refuse_shared_owners
from slide_reports.forms import read_drafts
from slide_reports.record import Record
from slide_reports.records import annotation_sources, read_records
from slide_reports.splits import assign_splits, fold_of, read_splits, share_seen, strata_by, write_splits
from slide_reports.table import column, fields

ORGAN = r"^\s*([^,;\n]+)"


def parse_arguments():
    parser = make_parser(__doc__)
    parser.add_argument("--train_json", required=True, help="all records, in any form that docs/records.md lists")
    parser.add_argument("--output", required=True, help="CSV to write: group (the patient), split, fold")
    parser.add_argument("--shares", nargs=3, type=float, default=[0.8, 0.1, 0.1], help="of records: train, val, test")
    parser.add_argument("--seed", type=int, default=0, help="of the order of patients")
    parser.add_argument("--num_folds", type=int, default=5, help="for cross-validation; independent of the split")
    parser.add_argument(
        "--stratify",
        default=None,
        help="organ (a report up to its first comma), or a field of the records, or a regular expression searched in "
        "the answer, whose first group is the stratum; default: no strata",
    )
    parser.add_argument("--earlier", default=None, help="table of an earlier split whose patients keep their places")
    parser.add_argument("--group_pattern", default=None, help="regular expression that finds the patient in an id")
    parser.add_argument("--exclude", default=None, help="CSV, text or annotation file with ids to leave out")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    check_output_file(args.output, train_json=args.train_json)
    if args.num_folds < 1:
        raise ValueError(f"--num_folds {args.num_folds}: at least 1 is needed")
    try:
        re.compile(args.stratify or "")
    except re.error as error:
        raise ValueError(f"--stratify {args.stratify!r} is no regular expression ({error})") from error
    records = read_records(args.train_json, group_pattern=args.group_pattern, exclude=args.exclude, locate_inputs=False)
    refuse_shared_owners(records)
    groups = column(records, "group")
    strata = find_strata(records, args.train_json, args.stratify) if args.stratify else None
    earlier = read_splits(args.earlier, "--earlier") if args.earlier else None
    shares = dict(zip(("train", "val", "test"), args.shares, strict=True))
    assigned = assign_splits(groups, shares, args.seed, strata, earlier)
    folds = {group: fold_of(group, args.num_folds, args.seed) for group in assigned}
    write_splits(args.output, assigned, folds)
    report(groups, [turns[0][1] for (turns,) in fields(records, "turns")], assigned, strata)
    return DONE


def find_strata(records: Sequence[Record], annotation: str, stratify: str) -> list[str]:
    """Stratum of each record, by --stratify.

    Raises:
        ValueError: no record has such a field, and no answer what the expression is to find.
    """
    stated = {} if stratify == "organ" else stated_strata(Path(annotation), stratify)
    strata = [stated.get(name, "") for name in column(records, "id")] if stated else []
    strata = strata or strata_by(records, lambda answer: stratum_of(answer, stratify))
    if not any(strata):
        raise ValueError(
            f"--stratify {stratify}: no record has such a field, and no answer has it in its text; give organ, a field "
            "of the records, or a regular expression"
        )
    return strata


def stated_strata(annotation: Path, name: str) -> dict[str, str]:
    """What a field says of each id, lower-cased; nothing where no row has it."""
    stated = {}
    for source, *_ in annotation_sources(annotation):
        for row in read_rows(source):
            value = row.values.get(name)
            if isinstance(value, str | int | float) and str(value).strip():
                stated |= dict.fromkeys((draft.id for draft in read_drafts(row)), str(value).strip().lower())
    return stated


def stratum_of(answer: str, stratify: str) -> str:
    """The stratum of an answer, lower-cased; empty where the expression is not found."""
    match = re.search(ORGAN if stratify == "organ" else stratify, answer)
    return "" if match is None else ((match.group(1) if match.re.groups else match.group()) or "").strip().lower()


def report(groups: list[str], texts: list[str], assigned: dict[str, str], strata: list[str] | None) -> None:
    """Print what fell where, and how many texts of each split occur in training."""
    by_split = {split: [] for split in ("train", "val", "test")}
    for group, text in zip(groups, texts, strict=True):
        by_split[assigned[group]].append(text)
    patients = Counter(assigned.values())
    for split, held in by_split.items():
        seen = share_seen(by_split["train"], held)
        also = "" if split == "train" else f", {seen:.1%} of its texts occur word for word in train"
        of_whom = counted(patients[split], "patient")
        print(f"{split:<6}{len(held):>8} records ({len(held) / len(groups):.1%}), {of_whom}{also}")
    if strata:
        for stratum, count in Counter(strata).most_common():
            where = Counter(assigned[group] for group, of in zip(groups, strata, strict=True) if of == stratum)
            shares = ", ".join(f"{split} {where[split] / count:.1%}" for split in by_split)
            print(f"  {stratum or '(none)':<24}{count:>6}: {shares}")


if __name__ == "__main__":
    run(main)
