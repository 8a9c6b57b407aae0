"""ROUGE-L F (beta 1.2) as pycocoevalcap defines it, mean over pairs, from 0 to 1.

As a local module of the library evaluate: `evaluate.load("evaluation/metrics/coco_rouge")`.
"""

from typing import Any

import evaluate

from evaluation.metrics.coco_rouge.formula import coco_rouge_l
from evaluation.metrics.face import text_pairs_info

CITATION = "@inproceedings{lin2004rouge, title={{ROUGE}: a package for automatic evaluation of summaries}, year={2004}}"


class CocoRouge(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return text_pairs_info(__doc__, CITATION)

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        return {"rouge_l": coco_rouge_l(predictions, references)}
