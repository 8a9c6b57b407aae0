"""Corpus chrF2 as sacrebleu reports it, divided by 100.

As a local module of the library evaluate: `evaluate.load("evaluation/metrics/chrf")`.
"""

from typing import Any

import evaluate

from evaluation.metrics.chrf.formula import chrf
from evaluation.metrics.face import text_pairs_info

CITATION = (
    "@inproceedings{popovic2015chrf, title={{chrF}: character n-gram {F}-score for automatic {MT} "
    "evaluation}, year={2015}}"
)


class Chrf(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return text_pairs_info(__doc__, CITATION)

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        return {"chrf": chrf(predictions, references)}
