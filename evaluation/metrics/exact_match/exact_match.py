"""Share of predictions equal to their reference in every word; line breaks and runs of blanks are one blank.

As a local module of the library evaluate: `evaluate.load("evaluation/metrics/exact_match")`.
"""

from typing import Any

import evaluate

from evaluation.metrics.exact_match.formula import exact_match
from evaluation.metrics.face import text_pairs_info

CITATION = ""


class ExactMatch(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return text_pairs_info(__doc__, CITATION)

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        return {"exact_match": exact_match(predictions, references)}
