"""CIDEr-D with the document frequencies of the references, mean over pairs, from 0 to 10.

As a local module of the library evaluate: `evaluate.load("evaluation/metrics/cider_d")`.
"""

from typing import Any

import evaluate

from evaluation.metrics.cider_d.formula import cider_d
from evaluation.metrics.face import text_pairs_info

CITATION = (
    "@inproceedings{vedantam2015cider, title={{CIDEr}: consensus-based image description evaluation}, year={2015}}"
)


class CiderD(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return text_pairs_info(__doc__, CITATION)

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        return {"cider_d": cider_d(predictions, references)}
