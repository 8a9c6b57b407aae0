"""Corpus BLEU-1 to BLEU-4 as pycocoevalcap defines them, on whitespace-split text, from 0 to 1.

As a local module of the library evaluate: `evaluate.load("evaluation/metrics/coco_bleu")`.
"""

from typing import Any

import evaluate

from evaluation.metrics.coco_bleu.formula import coco_bleu
from evaluation.metrics.face import text_pairs_info

CITATION = (
    "@inproceedings{papineni2002bleu, title={{BLEU}: a method for automatic evaluation of machine "
    "translation}, booktitle={ACL}, year={2002}}"
)


class CocoBleu(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return text_pairs_info(__doc__, CITATION)

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        return coco_bleu(predictions, references)
