"""ROUGE-1, ROUGE-2 and ROUGE-L F1 as the library rouge-score defines them, means over pairs.

As a local module of the library evaluate: `evaluate.load("evaluation/metrics/rouge_score_f1")`.
"""

from typing import Any

import evaluate

from evaluation.metrics.face import text_pairs_info
from evaluation.metrics.rouge_score_f1.formula import rouge_score_f1

CITATION = "@inproceedings{lin2004rouge, title={{ROUGE}: a package for automatic evaluation of summaries}, year={2004}}"


class RougeScoreF1(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return text_pairs_info(__doc__, CITATION)

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        return rouge_score_f1(predictions, references)
