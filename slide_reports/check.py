r"""Check annotation files, and the features or images that they name, before training on them.

    python slide_reports/check.py --train_json reports.json --features_dir OUT/features

One line per finding on stdout, a table at the end. The exit status is 0 when there is nothing wrong, 1 when training
would leave records out, 2 when it would learn something wrong.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import numpy as np

from command_line import DONE, REFUSED, SOME_FAILED, make_parser, run
from slide_features import atomic_path
from slide_reports.edits import Edits
from slide_reports.findings import LEFT_OUT, WRONG, Finding, find_all, unmatched_ids
from slide_reports.record import Record
from slide_reports.records import add_data_arguments, read_splits_of_training
from slide_reports.table import column, fields

PERCENTILES = (50, 95, 100)


def parse_arguments():
    parser = make_parser(__doc__)
    add_data_arguments(parser)
    group = parser.add_argument_group("Check")
    group.add_argument("--test_json", default=None, help="test records, to be told apart from training's")
    group.add_argument("--llm_name", default=None, help="language model whose tokenizer counts; default: count words")
    group.add_argument("--json", default=None, help="file to write all findings and counts to")
    group.add_argument("--seed", type=int, default=0, help="of the split, where validation is split off --train_json")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    reading = {key: getattr(args, key) for key in ("features_dir", "image_root", "group_pattern")}
    edits = Edits(args.exclude, args.revise)
    splits = read_splits_of_training(
        args.train_json,
        args.val_json,
        args.test_json,
        val_fraction=args.val_fraction,
        seed=args.seed,
        splits=args.splits,
        fold=args.fold,
        edits=edits,
        **reading,
    )
    findings = []
    for finding in chain(unmatched_ids(edits), find_all(splits, args.features_dir and Path(args.features_dir))):
        findings.append(finding)
        print(f"{finding.severity}: {finding.line}", flush=True)
    lengths = text_lengths(splits, args.llm_name)
    print_table(splits, findings, lengths, "tokens" if args.llm_name else "words")
    if args.json:
        write_json(args.json, splits, findings, lengths)
    severities = {finding.severity for finding in findings}
    return REFUSED if WRONG in severities else SOME_FAILED if LEFT_OUT in severities else DONE


def write_json(path: str, splits: dict[str, Sequence[Record]], findings: list[Finding], lengths: dict) -> None:
    sizes = {
        split: {"records": len(records), "patients": len(set(column(records, "group")))}
        for split, records in splits.items()
    }
    found = {
        "splits": sizes,
        "lengths": lengths,
        "findings": [asdict(finding) | {"what": finding.line} for finding in findings],
    }
    with atomic_path(path) as partial:
        partial.write_text(json.dumps(found, indent=1) + "\n")


def text_lengths(splits: dict[str, Sequence[Record]], llm_name: str | None) -> dict[str, dict[str, list[float]]]:
    """Median, 95th percentile and maximum length of questions and answers of each split, in tokens or words."""
    if llm_name:
        from language_model import load_tokenizer

        tokenizer = load_tokenizer(llm_name)

        def count(texts: list[str]) -> list[int]:
            return [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    else:

        def count(texts: list[str]) -> list[int]:
            return [len(text.split()) for text in texts]

    lengths = {}
    for split, records in splits.items():
        turns = [turn for (of_record,) in fields(records, "turns") for turn in of_record]
        texts = {"question": [q for q, _ in turns if q], "answer": [a for _, a in turns if a]}
        lengths[split] = {
            name: np.percentile(count(held), PERCENTILES).tolist() if held else [0.0] * len(PERCENTILES)
            for name, held in texts.items()
        }
    return lengths


def print_table(splits: dict[str, Sequence[Record]], findings: list[Finding], lengths: dict, unit: str) -> None:
    print()
    print(f"{'split':<12}{'records':>9}{'patients':>9}{'texts':>9}   answer {unit}: median, 95 %, longest")
    for split, records in splits.items():
        texts = {turns[0][1] for (turns,) in fields(records, "turns")}
        answer = ", ".join(f"{length:g}" for length in lengths[split]["answer"])
        print(f"{split:<12}{len(records):>9}{len(set(column(records, 'group'))):>9}{len(texts):>9}   {answer}")
    counts: Counter[tuple[str, str]] = Counter()
    for finding in findings:
        counts[finding.severity, finding.kind] += finding.count
    print()
    for (severity, kind), count in sorted(counts.items(), reverse=True):
        print(f"{severity:<12}{kind:<24}{count:>9}")
    if not counts:
        print("nothing found")


if __name__ == "__main__":
    run(main)
