"""BERTScore precision, recall and F1; `compute(..., model="name or folder", layer=-1)`.

As a local module of the library evaluate: `evaluate.load("evaluation/metrics/bert_score_f1")`.
"""

from typing import Any

import evaluate

from evaluation.metrics.bert_score_f1.formula import bert_score
from evaluation.metrics.face import text_pairs_info
from evaluation.metrics.text_encoder import TextEncoder

CITATION = (
    "@inproceedings{zhang2020bertscore, title={{BERTScore}: evaluating text generation with {BERT}}, year={2020}}"
)


class BertScoreF1(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return text_pairs_info(__doc__, CITATION)

    def _compute(self, predictions: list[str], references: list[str], model: str, layer: int = -1) -> dict[str, Any]:
        return bert_score(predictions, references, TextEncoder(model), layer=layer)
