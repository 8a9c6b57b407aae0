"""Cosine of mean-pooled text embeddings; `compute(..., model="name or folder")`.

As a local module of the library evaluate: `evaluate.load("evaluation/metrics/embedding_cosine")`.
"""

from typing import Any

import evaluate

from evaluation.metrics.embedding_cosine.formula import embedding_cosine
from evaluation.metrics.face import text_pairs_info
from evaluation.metrics.text_encoder import TextEncoder

CITATION = ""


class EmbeddingCosine(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return text_pairs_info(__doc__, CITATION)

    def _compute(self, predictions: list[str], references: list[str], model: str) -> dict[str, Any]:
        return {"embedding_cosine": embedding_cosine(predictions, references, TextEncoder(model))}
