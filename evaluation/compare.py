r"""Compare two sets of predictions on the same references: is B better than A, and by how much?

    python evaluation/compare.py A.json B.json --references R.json --output comparison.json

Prints, for every metric, both scores, their difference with a 95 % interval (paired bootstrap over patients), p of an
approximate randomization test (patients' reports exchanged between A and B), p corrected for the number of metrics
(Holm), and effect sizes: Cohen's d of the patients' differences, and the share of patients for whom B is better (ties
half; both only for metrics that are means over reports). Exit status: 0 compared; 1 some predictions were missing or
unusable (scored as empty text); 2 refused.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt

from command_line import DONE, SOME_FAILED, check_output_file, chosen, counted, make_parser, run

COLUMNS = ("a", "b", "difference", "low", "high", "p", "p_holm", "cohens_dz", "superiority")


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("a", type=Path, help="JSON of the one set of predictions")
    parser.add_argument("b", type=Path, help="JSON of the other")
    parser.add_argument("--references", type=Path, required=True, help="JSON of reference reports")
    parser.add_argument("--output", type=Path, default=None, help="JSON file that receives the comparison")
    parser.add_argument("--group_pattern", default=None, help="regular expression that finds the patient in an id")
    parser.add_argument("--num_resamples", type=PositiveInt, default=2000, help="bootstrap samples")
    parser.add_argument("--num_shuffles", type=PositiveInt, default=5000, help="exchanges of the randomization test")
    parser.add_argument("--seed", type=NonNegativeInt, default=0, help="of resampling and exchanging")
    parser.add_argument("--entity_model", default=None, help="spaCy model for KEY, such as en_core_sci_lg, or a folder")
    parser.add_argument("--embedding_model", default=None, help="transformers model for EMB and BERTScore, or a folder")
    parser.add_argument("--device", default="cpu", help="where the embedding model runs")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = parse_args(argv)
    check_output_file(args.output, **chosen(args, ("a", "b", "references")))

    # Data
    from evaluation.report_files import WHAT_WAS_DONE, pair_reports, read_reports, shown
    from evaluation.score import open_models, patients_of

    references = read_reports(args.references, part="test")
    sides = [pair_reports(read_reports(path, part="test"), references, str(path)) for path in (args.a, args.b)]
    patients = patients_of(sides[0].ids, args.group_pattern)

    # Compare
    from evaluation.rows import measure

    models = open_models(args)
    scored = [measure(pairs, models) for pairs in sides]
    rows = compare(*scored, [patients[key] for key in sides[0].ids], args)

    # Save
    result = {
        "a": str(args.a),
        "b": str(args.b),
        "n": len(sides[0].ids),
        "num_patients": len(set(patients.values())),
        "problems": {
            name: {kind: len(ids) for kind, ids in side.problems.items()}
            for name, side in zip("ab", sides, strict=True)
        },
        "metrics": rows,
    }
    if args.output:
        from slide_features import atomic_path

        with atomic_path(args.output) as partial:
            partial.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(
        f"{counted(result['n'], 'report')} of {counted(result['num_patients'], 'patient')}; differences are B less A\n"
    )
    print(table(rows))
    for path, pairs in zip((args.a, args.b), sides, strict=True):
        for kind, ids in pairs.problems.items():
            if ids:
                print(f"compare.py: {path}: {len(ids)} {WHAT_WAS_DONE[kind]}: {shown(ids)}", file=sys.stderr)
    return SOME_FAILED if any(side.has_failures for side in sides) else DONE


def compare(a: Any, b: Any, owners: Sequence[str], args: Namespace) -> dict[str, dict[str, Any]]:
    """Every metric of two `PairScores` over the same references."""
    import numpy as np

    from evaluation.resampling import effect_sizes, paired_differences, randomization_test, sums_by_patient

    sums_a, sums_b = sums_by_patient(a.stacked(), owners), sums_by_patient(b.stacked(), owners)
    scores_a, scores_b = a.corpus(), b.corpus()
    drawn = paired_differences(sums_a, sums_b, a.scores_of, num_resamples=args.num_resamples, seed=args.seed)
    chances = randomization_test(sums_a, sums_b, a.scores_of, num_shuffles=args.num_shuffles, seed=args.seed)
    corrected = holm(chances)
    rows = {}
    for name in scores_a:
        low, high = np.percentile(drawn[name], (2.5, 97.5))
        rows[name] = {
            "a": scores_a[name],
            "b": scores_b[name],
            "difference": scores_b[name] - scores_a[name],
            "low": float(low),
            "high": float(high),
            "p": chances[name],
            "p_holm": corrected[name],
        }
        if name in a.means:
            place = list(a.means).index(name)
            rows[name] |= effect_sizes(sums_a[:, place] / sums_a[:, -1], sums_b[:, place] / sums_b[:, -1])
    return rows


def holm(chances: dict[str, float]) -> dict[str, float]:
    """p values corrected for their number (Holm 1979)."""
    corrected, worst = {}, 0.0
    for place, name in enumerate(sorted(chances, key=chances.__getitem__)):
        worst = max(worst, min(1.0, (len(chances) - place) * chances[name]))
        corrected[name] = worst
    return corrected


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Lay out one line per metric."""
    head = f"{'':<22}" + "".join(f"{name:>12}" for name in COLUMNS)
    lines = []
    for name, row in rows.items():
        cells = ("" if row.get(column) is None else f"{row[column]:.4f}" for column in COLUMNS)
        lines.append(f"{name:<22}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join([head, *lines])


if __name__ == "__main__":
    run(main, to_go_on="run it again")
