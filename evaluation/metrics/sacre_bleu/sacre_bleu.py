"""Corpus BLEU as sacrebleu reports it (13a, exponential smoothing), divided by 100.

As a local module of the library evaluate: `evaluate.load("evaluation/metrics/sacre_bleu")`.
"""

from typing import Any

import evaluate

from evaluation.metrics.face import text_pairs_info
from evaluation.metrics.sacre_bleu.formula import sacre_bleu

CITATION = "@inproceedings{post2018call, title={A call for clarity in reporting {BLEU} scores}, year={2018}}"


class SacreBleu(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return text_pairs_info(__doc__, CITATION)

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        return {"sacre_bleu": sacre_bleu(predictions, references)}
