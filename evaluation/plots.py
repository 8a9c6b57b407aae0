r"""Draw training curves of one or many runs over one another, and the scores of several results side by side.

    python evaluation/plots.py --runs runs/stage1 runs/stage2 --scores scores/uni scores/virchow --output_dir pictures

Writes curves.png of the runs' log.jsonl, and comparison.png and distributions.png of the results that score.py wrote
(one for each encoder, projector or seed). Exit status: 0 all drawn; 1 a run or result could not be read; 2 refused.
"""

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from command_line import DONE, SOME_FAILED, check_output_folder, make_parser, run

METRICS = ["bleu_4", "rouge_l", "meteor", "cider_d", "exact_match"]


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--runs", type=Path, nargs="+", default=[], help="run folders of training, with log.jsonl")
    parser.add_argument("--scores", type=Path, nargs="+", default=[], help="output folders of score.py")
    parser.add_argument(
        "--names", nargs="+", default=[], help="names of the results, by default those of their folders"
    )
    parser.add_argument("--metrics", nargs="+", default=METRICS, help="metrics compared")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder that receives the pictures")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = parse_args(argv)
    if not args.runs and not args.scores:
        raise ValueError("nothing to draw: name --runs, --scores or both")
    if args.names and len(args.names) != len(args.scores):
        raise ValueError(f"--names has {len(args.names)} names for {len(args.scores)} folders of --scores")

    check_output_folder(args.output_dir)

    # Data
    failures: list[str] = []
    logs = {
        name: lines for name, path in zip(_names(args.runs), args.runs, strict=True) if (lines := _log(path, failures))
    }
    names = args.names or _names(args.scores)
    results = {name: found for name, path in zip(names, args.scores, strict=True) if (found := _result(path, failures))}

    # Pictures
    from evaluation.figures import comparison_figure, curves_figure, distribution_figure, metric_name

    figures: dict[str, Any] = {}
    if logs:
        figures["curves.png"] = curves_figure(logs)
    if results:
        metrics = {name: found[0] for name, found in results.items()}
        if unknown := [name for name in args.metrics if any(name not in one for one in metrics.values())]:
            raise ValueError(f"--metrics {', '.join(unknown)}: not in every metrics.json")
        figures["comparison.png"] = comparison_figure(metrics, args.metrics)
        figures["distributions.png"] = distribution_figure(
            {f"{name}: {metric_name('rouge_l')}": found[1] for name, found in results.items() if len(found[1])}
        )
    if not figures:
        raise ValueError("; ".join(failures))

    # Save
    from evaluation.figures import picture
    from slide_features import atomic_path

    for name, figure in figures.items():
        with atomic_path(args.output_dir / name) as partial:
            partial.write_bytes(picture(figure, "png"))
        print(args.output_dir / name)
    for failure in failures:
        print(f"plots.py: {failure}", file=sys.stderr)
    return SOME_FAILED if failures else DONE


def _names(paths: Sequence[Path]) -> list[str]:
    """Short names that differ: the folders' own, or as much of their paths as is needed."""
    for depth in range(1, max((len(path.parts) for path in paths), default=1) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len({*names}) == len(names):
            return names
    return [f"{'/'.join(path.parts)} ({place})" for place, path in enumerate(paths)]


def _log(path: Path, failures: list[str]) -> list[dict[str, Any]]:
    from run_log import read_log

    lines = read_log(path / "log.jsonl")
    if not lines:
        failures.append(f"{path}: no log.jsonl with lines; give a run folder of training")
    return lines


def _result(path: Path, failures: list[str]) -> tuple[dict[str, Any], Any] | None:
    import numpy as np

    try:
        metrics = json.loads((path / "metrics.json").read_text(encoding="utf-8"))
        with (path / "cases.csv").open(encoding="utf-8", newline="") as file:
            values = np.array([float(row["rouge_l"]) for row in csv.DictReader(file)])
    except (OSError, ValueError, KeyError) as error:
        failures.append(f"{path}: no result of score.py ({error})")
        return None
    return metrics, values


if __name__ == "__main__":
    run(main, to_go_on="run it again")
