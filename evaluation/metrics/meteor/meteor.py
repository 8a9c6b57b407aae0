"""METEOR by nltk, with WordNet where it is installed; "meteor_variant" says whether it was.

As a local module of the library evaluate: `evaluate.load("evaluation/metrics/meteor")`.
"""

from typing import Any

import evaluate

from evaluation.metrics.face import text_pairs_info
from evaluation.metrics.meteor.formula import WITH_SYNONYMS, WITHOUT_SYNONYMS, meteor, open_wordnet

CITATION = "@inproceedings{lavie2007meteor, title={{METEOR}: an automatic metric for {MT} evaluation}, year={2007}}"


class Meteor(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return text_pairs_info(__doc__, CITATION)

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        wordnet = open_wordnet()
        return {
            "meteor": meteor(predictions, references, wordnet),
            "meteor_variant": WITH_SYNONYMS if wordnet else WITHOUT_SYNONYMS,
        }
