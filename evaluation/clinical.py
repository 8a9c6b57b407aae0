"""What a clinician asks of the predictions: fields, serious mistakes, calibration, survival."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jsonargparse import Namespace

from evaluation.field_scores import accuracy_intervals, field_hits, score_fields
from evaluation.fields import ReportFields, parse_all
from evaluation.mistakes import Mistake, count_mistakes, find_mistakes
from evaluation.report_files import PairedReports, Reports, finite
from evaluation.survival import FollowUp, choose_risks, read_follow_up, read_risks, survival_scores


@dataclass
class Clinical:
    """Fields of both sides, the mistakes, and what pictures are drawn of; `metrics` goes into metrics.json."""

    predicted: list[ReportFields]
    expected: list[ReportFields]
    mistakes: list[Mistake]
    metrics: dict[str, Any]
    confidences: dict[str, float] = field(default_factory=dict)
    follow_up: dict[str, FollowUp] = field(default_factory=dict)
    risks: dict[str, float] = field(default_factory=dict)

    def hits(self) -> dict[str, np.ndarray]:
        """Agreement of each field by case; see `field_hits`."""
        return field_hits(self.predicted, self.expected)


def score_clinically(
    pairs: PairedReports,
    predictions: Reports,
    references: Reports,
    patients: Mapping[str, str],
    args: Namespace,
) -> Clinical:
    """Parse both sides and compare them."""
    known = parse_all([*pairs.hypotheses, *pairs.references])
    predicted = [known[text] for text in pairs.hypotheses]
    expected = [known[text] for text in pairs.references]
    mistakes = find_mistakes(pairs.ids, pairs.hypotheses, predicted, expected)
    result = Clinical(predicted, expected, mistakes, {})
    result.metrics["mistakes"] = count_mistakes(mistakes, len(pairs.ids))
    result.metrics["fields"] = score_fields(predicted, expected)
    if args.num_resamples:
        owners = [patients[key] for key in pairs.ids]
        spread = accuracy_intervals(result.hits(), owners, num_resamples=args.num_resamples, seed=args.seed)
        for name, low_high in spread.items():
            result.metrics["fields"][name]["accuracy_95"] = low_high
    result.metrics["references_parsed"] = sum(fields.is_complete for fields in expected) / len(expected)
    result.confidences = confidences_of(predictions, pairs.ids)
    if result.confidences:
        wrong = {mistake.id for mistake in mistakes}
        result.metrics["calibration"] = calibration(result.confidences, wrong)
    scored = set(pairs.ids)
    result.follow_up = {
        key: one
        for key, one in read_follow_up(references.records, args.time_field, args.event_field).items()
        if key in scored
    }
    if args.risks and not result.follow_up:
        raise ValueError(
            f"--risks {args.risks}: no reference carries {args.time_field!r} and {args.event_field!r}; "
            "name the fields with --time_field and --event_field"
        )
    if result.follow_up:
        given = read_risks(args.risks) if args.risks else _risks_of(predictions)
        result.risks, source = choose_risks(pairs.ids, pairs.hypotheses, predicted, given)
        result.metrics["survival"] = survival_scores(result.follow_up, result.risks, source)
    return result


def confidences_of(predictions: Reports, ids: list[str]) -> dict[str, float]:
    """Confidence of each prediction with a `beam_score` (mean log probability of a token): its exponential, 0 to 1."""
    scores = {key: finite(predictions.records.get(key, {}).get("beam_score")) for key in ids}
    return {key: float(np.exp(min(score, 0.0))) for key, score in scores.items() if score is not None}


def calibration(confidences: dict[str, float], wrong: set[str], num_bins: int = 10) -> dict[str, Any]:
    """Share of reports without a serious mistake in bins of confidence with equally many reports.

    `expected_calibration_error` is the mean gap between both, weighted by the bins' sizes.
    """
    ordered = sorted(confidences, key=lambda key: (confidences[key], key))
    bins = [part for part in np.array_split(np.array(ordered, dtype=object), min(num_bins, len(ordered))) if len(part)]
    rows = [
        {
            "n": len(part),
            "confidence": float(np.mean([confidences[key] for key in part])),
            "without_serious_mistake": float(np.mean([key not in wrong for key in part])),
        }
        for part in bins
    ]
    gaps = [row["n"] * abs(row["confidence"] - row["without_serious_mistake"]) for row in rows]
    return {"bins": rows, "expected_calibration_error": sum(gaps) / len(ordered)}


def _risks_of(predictions: Reports) -> dict[str, float]:
    found = {key: finite(record.get("risk")) for key, record in predictions.records.items()}
    return {key: risk for key, risk in found.items() if risk is not None}
