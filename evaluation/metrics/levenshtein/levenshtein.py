"""Levenshtein ratio of characters, mean over pairs, from 0 to 1.

As a local module of the library evaluate: `evaluate.load("evaluation/metrics/levenshtein")`.
"""

from typing import Any

import evaluate

from evaluation.metrics.face import text_pairs_info
from evaluation.metrics.levenshtein.formula import levenshtein_ratio

CITATION = ""


class Levenshtein(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return text_pairs_info(__doc__, CITATION)

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        return {"levenshtein_ratio": levenshtein_ratio(predictions, references)}
