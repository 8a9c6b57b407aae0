r"""Choose below which confidence an answer is marked uncertain, so that the others are seldom wrong.

  python inference/predict.py --model runs/stage2/final_model --test_json val.json --features_dir OUT/features \
      --output val_predictions.json --details
  python inference/calibrate.py --predictions val_predictions.json --references val.json --max_error 0.05 \
      --model runs/stage2/final_model

The method is selection with guaranteed risk (Geifman and El-Yaniv 2017): a binary search over thresholds in which each
step's error rate is bounded from above by the exact binomial (Clopper-Pearson) limit, at a share of --delta. With
probability 1 - delta over the drawing of validation records, answers above the threshold are wrong at most at the rate
--max_error, if new records are like those of validation and records are independent of each other.
"""

import json
import math
import re
import sys
from pathlib import Path

from jsonargparse.typing import OpenUnitInterval

from command_line import DONE, SOME_FAILED, check_output_file, chosen, make_parser, run
from inference.arguments import MEASURES


def parse_arguments():
    parser = make_parser(__doc__)
    parser.add_argument("--predictions", required=True, help="of validation records, by predict.py --details")
    parser.add_argument("--references", required=True, help="annotation file with the true reports of those records")
    parser.add_argument("--max_error", type=OpenUnitInterval, default=0.05, help="error rate to stay below")
    parser.add_argument(
        "--delta", type=OpenUnitInterval, default=0.1, help="probability that the rate is higher all the same"
    )
    parser.add_argument(
        "--measure", choices=MEASURES, default=MEASURES[0], help="of confidence; over the tokens of an answer"
    )
    parser.add_argument(
        "--field",
        default=None,
        help="regular expression; an answer is wrong if what its first group finds differs from the reference's; "
        "default: if the texts differ in more than blanks",
    )
    parser.add_argument("--model", default=None, help="final_model folder whose vlm.json receives the threshold")
    parser.add_argument("--output", default=None, help="JSON file that receives it, instead or as well")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    check_output_file(args.output, **chosen(args, ("predictions", "references")))

    from slide_features import atomic_path
    from vlm_settings import VLMSettings

    settings = VLMSettings.read(args.model) if args.model else None
    confidences, wrong = read_pairs(args.predictions, args.references, args.measure, args.field)
    found = choose_threshold(confidences, wrong, args.max_error, args.delta)
    named = {"measure": args.measure, "max_error": args.max_error, "delta": args.delta, "field": args.field}
    described = named | {"records": len(wrong), "error_rate_of_all": sum(wrong) / len(wrong)}
    if found is None:
        print(json.dumps(described | {"threshold": None}, indent=1))
        print(
            f"no threshold keeps the error rate below {args.max_error:g} with this certainty; give more validation "
            "records, a higher --max_error or --delta, or a better model",
            file=sys.stderr,
        )
        return SOME_FAILED
    described |= found | {"method": "selection with guaranteed risk, Clopper-Pearson bound"}
    described["decoding"] = decoding_of(args.predictions)
    print(json.dumps(described, indent=1))
    if args.output:
        with atomic_path(Path(args.output)) as partial:
            partial.write_text(json.dumps(described, indent=1) + "\n")
    if settings is not None:
        settings.decoding["uncertain"] = described
        settings.write(Path(args.model))
    return DONE


def read_pairs(predictions: str, references: str, measure: str, pattern: str | None) -> tuple[list[float], list[bool]]:
    """Confidence of each prediction that has a reference, and whether it is wrong.

    Raises:
        ValueError: a prediction lacks its confidence, an id and question come twice, or nothing matches.
    """
    from slide_reports import read_records

    try:
        field = re.compile(pattern) if pattern else None
    except re.error as error:
        raise ValueError(f"--field {pattern!r} is no regular expression ({error})") from error
    if not Path(predictions).is_file():
        raise FileNotFoundError(f"--predictions {predictions}: no such file")
    truths = {}
    for record in read_records(references, locate_inputs=False):
        if record.answer and truths.setdefault((record.id, record.question), record.answer) != record.answer:
            raise ValueError(f"--references {references}: {record.id} has two answers to one question; keep one")
    confidences, wrong = [], []
    for number, row in enumerate(json.loads(Path(predictions).read_text())):
        if not isinstance(row, dict) or measure not in row:
            raise ValueError(f"--predictions {predictions}: row {number} has no {measure}; predict with --details")
        truth = truths.get((row["id"], row["question"]), truths.get((row["id"], "")))
        if truth is not None:
            confidences.append(float(row[measure]))
            wrong.append(_told(row["report"], field) != _told(truth, field))
    if not wrong:
        raise ValueError(f"{predictions}: no row has the id and question of a reference in {references}")
    return confidences, wrong


def _told(text: str, field: re.Pattern | None) -> str | None:
    if field is None:
        return " ".join(text.split())
    found = field.search(text)
    return found and (found.group(1) if field.groups else found.group())


def choose_threshold(
    confidences: list[float], wrong: list[bool], max_error: float, delta: float
) -> dict[str, float] | None:
    """The lowest threshold that the search finds good: of its answers, at least as confident, at most ``max_error`` are
    wrong, with probability 1 - ``delta``. None if no threshold is.

    Returns:
        ``threshold``; ``coverage``, the share of records at or above it; ``kept`` and ``errors`` among them; and
        ``error_bound``, the upper limit of their error rate.
    """
    order = sorted(range(len(confidences)), key=lambda i: confidences[i])
    levels = sorted(set(confidences))
    steps = max(1, math.ceil(math.log2(len(levels) + 1)))
    # For each distinct confidence: how many answers are at or above it, and how many of those are wrong.
    kept_at, errors_at = {}, {}
    errors = 0
    for kept, index in enumerate(reversed(order), 1):
        errors += wrong[index]
        kept_at[confidences[index]], errors_at[confidences[index]] = kept, errors
    low, high, found = 0, len(levels), None
    while low < high:
        middle = (low + high) // 2
        level = levels[middle]
        bound = error_bound(errors_at[level], kept_at[level], delta / steps)
        if bound <= max_error:
            high = middle
            found = {
                "threshold": level,
                "coverage": kept_at[level] / len(confidences),
                "kept": kept_at[level],
                "errors": errors_at[level],
                "error_bound": bound,
            }
        else:
            low = middle + 1
    return found


def error_bound(errors: int, trials: int, delta: float) -> float:
    """Upper Clopper-Pearson limit: the rate at which ``errors`` or fewer of ``trials`` have probability ``delta``."""
    if errors >= trials:
        return 1.0
    low, high = errors / trials, 1.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if binomial_cdf(errors, trials, middle) > delta else (low, middle)
    return high


def binomial_cdf(errors: int, trials: int, rate: float) -> float:
    """Probability of ``errors`` or fewer in ``trials`` at a rate between 0 and 1."""
    if not 0 < rate < 1:
        return float(rate <= 0 or errors >= trials)
    logs = [
        math.lgamma(trials + 1)
        - math.lgamma(k + 1)
        - math.lgamma(trials - k + 1)
        + k * math.log(rate)
        + (trials - k) * math.log1p(-rate)
        for k in range(errors + 1)
    ]
    return min(1.0, math.fsum(map(math.exp, logs)))


def decoding_of(predictions: str) -> dict:
    """The decoding flags that predictions were made with, where their run file is beside them."""
    run_file = Path(predictions + ".run.json")
    flags = json.loads(run_file.read_text()) if run_file.is_file() else {}
    names = ("num_beams", "max_new_tokens", "length_penalty", "do_sample", "temperature", "top_p", "load_in")
    return {name: flags[name] for name in names if name in flags}


if __name__ == "__main__":
    run(main, to_go_on="run it again")
