"""REG 2025 ranking score; `compute(..., entity_model="en_core_sci_lg", embedding_model="name or folder")`.

What is not given is not computed, and then "reg_score" is None and "reg_status" says "partial".

As a local module of the library evaluate: `evaluate.load("evaluation/metrics/reg_score")`.
"""

from typing import Any

import evaluate

from evaluation.metrics.face import text_pairs_info
from evaluation.metrics.reg_score.formula import load_entities, reg_score
from evaluation.metrics.text_encoder import TextEncoder

CITATION = ""


class RegScore(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return text_pairs_info(__doc__, CITATION)

    def _compute(
        self,
        predictions: list[str],
        references: list[str],
        entity_model: str | None = None,
        embedding_model: str | None = None,
    ) -> dict[str, Any]:
        entities = load_entities(entity_model) if entity_model else None
        embed = TextEncoder(embedding_model).mean_pooled if embedding_model else None
        return reg_score(predictions, references, entities=entities, embed=embed)
