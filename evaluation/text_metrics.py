"""All text metrics of many pairs at once, kept pair by pair so that they can be resampled by patient."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from evaluation.metrics.bert_score_f1 import formula as bert
from evaluation.metrics.chrf.formula import chrf_counts, chrf_of
from evaluation.metrics.cider_d.formula import DocumentFrequency, cider_pairs, document_frequency
from evaluation.metrics.coco_bleu.formula import bleu_counts, bleu_of
from evaluation.metrics.coco_rouge.formula import rouge_l_pair
from evaluation.metrics.embedding_cosine.formula import cosine_pairs
from evaluation.metrics.exact_match.formula import is_exact
from evaluation.metrics.levenshtein.formula import levenshtein_pairs
from evaluation.metrics.meteor.formula import meteor_pairs, open_wordnet
from evaluation.metrics.reg_score.formula import WEIGHTS, Entities, reg_parts
from evaluation.metrics.rouge_score_f1 import formula as rouge
from evaluation.metrics.sacre_bleu.formula import sacre_bleu_counts, sacre_bleu_of

# Corpus metrics: the scores of counts summed over pairs.
CORPUS_METRICS: dict[str, Callable[[np.ndarray], dict[str, np.ndarray]]] = {
    "coco_bleu": bleu_of,
    "sacre_bleu": lambda counts: {"sacre_bleu": sacre_bleu_of(counts)},
    "chrf": lambda counts: {"chrf": chrf_of(counts)},
}


@dataclass
class TextModels:
    """What the metrics need beyond the texts; None leaves a metric out (METEOR: its synonyms)."""

    wordnet: Any | None = None
    entities: Entities | None = None
    encoder: Any | None = None  # evaluation.metrics.text_encoder.TextEncoder

    def __getstate__(self) -> dict[str, Any]:
        """WordNet holds open files; a process that receives the models opens it anew."""
        return self.__dict__ | {"wordnet": self.wordnet is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"wordnet": open_wordnet() if state["wordnet"] else None}


@dataclass
class PairScores:
    """Scores of N pairs: `means` are averaged over pairs, (N,) each; `counts` are summed first, (N, K) each."""

    means: dict[str, np.ndarray] = field(default_factory=dict)
    counts: dict[str, np.ndarray] = field(default_factory=dict)

    def stacked(self) -> np.ndarray:
        """All columns side by side, (N, M), the number of pairs last; `scores_of` reads sums of its rows."""
        num_pairs = len(next(iter(self.means.values())))
        columns = [values[:, None] for values in self.means.values()] + list(self.counts.values())
        return np.concatenate([*columns, np.ones((num_pairs, 1))], axis=1)

    def scores_of(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """Every metric of summed rows of `stacked`, (..., M); each result has the leading shape."""
        scores, place = {}, 0
        for name in self.means:
            scores[name] = sums[..., place] / sums[..., -1]
            place += 1
        for name, counts in self.counts.items():
            scores |= CORPUS_METRICS[name](sums[..., place : place + counts.shape[1]])
            place += counts.shape[1]
        return scores

    def corpus(self) -> dict[str, float]:
        """Every metric over all pairs."""
        return {name: float(score) for name, score in self.scores_of(self.stacked().sum(axis=0)).items()}


def joined(parts: Sequence[PairScores]) -> PairScores:
    """Scores of slices of the pairs, one after the other."""
    return PairScores(
        means={name: np.concatenate([part.means[name] for part in parts]) for name in parts[0].means},
        counts={name: np.concatenate([part.counts[name] for part in parts]) for name in parts[0].counts},
    )


def score_pairs(
    hypotheses: Sequence[str], references: Sequence[str], models: TextModels, documents: DocumentFrequency | None = None
) -> PairScores:
    """Score each pair; equal pairs are computed once. An empty prediction scores 0 (empty references: as defined).

    `documents` is the `document_frequency` of all references where these are a part of them, for CIDEr-D.
    """
    pairs = list(zip(hypotheses, references, strict=True))
    places = {pair: place for place, pair in enumerate(dict.fromkeys(pairs))}
    distinct_hypotheses, distinct_references = (list(side) for side in zip(*places, strict=True))
    distinct = distinct_hypotheses, distinct_references
    rouges = rouge.rouge_pairs(*distinct)
    means = {
        "exact_match": np.array([float(is_exact(*pair)) for pair in places]),
        "rouge_l": np.array([rouge_l_pair(*pair) for pair in places]),
        **{name: rouges[:, i] for i, name in enumerate(rouge.NAMES)},
        "meteor": np.array(meteor_pairs(*distinct, models.wordnet)),
        "cider_d": cider_pairs(*distinct, documents=documents or document_frequency(references)),
        "levenshtein_ratio": levenshtein_pairs(*distinct),
    }
    if models.encoder is not None:
        means["embedding_cosine"] = cosine_pairs(*distinct, models.encoder)
        berts = bert.bert_score_pairs(*distinct, models.encoder)
        means |= {name: berts[:, i] for i, name in enumerate(bert.NAMES)}
    embed = models.encoder.mean_pooled if models.encoder is not None else None
    parts = reg_parts(*distinct, entities=models.entities, embed=embed)
    means |= {f"reg_{name}": values for name, values in parts.items()}
    if len(parts) == len(WEIGHTS):
        means["reg_score"] = sum(WEIGHTS[name] * values for name, values in parts.items())
    counts = {
        "coco_bleu": bleu_counts(*distinct),
        "sacre_bleu": sacre_bleu_counts(*distinct),
        "chrf": chrf_counts(*distinct),
    }
    rows = np.array([places[pair] for pair in pairs])
    return PairScores(
        means={name: values[rows] for name, values in means.items()},
        counts={name: values[rows] for name, values in counts.items()},
    )
