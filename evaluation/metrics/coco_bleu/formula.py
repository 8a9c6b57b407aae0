"""Corpus BLEU-1 to BLEU-4 by the definition that report-generation papers use (pycocoevalcap's `Bleu`)."""

from collections.abc import Sequence

import numpy as np

from evaluation.metrics.ngram_statistics import bleu_statistics
from evaluation.metrics.pairs import check_pairs

# pycocoevalcap's constants: they keep a count of zero from making log(0), and published figures contain them.
TINY, SMALL = 1e-15, 1e-9
NAMES = ("bleu_1", "bleu_2", "bleu_3", "bleu_4")


def coco_bleu(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Score a corpus; returns `{"bleu_1": …, …, "bleu_4": …}`, each between 0 and 1.

    Text is split at whitespace and nothing else (no PTB tokenizer, case kept). N-gram counts, clipped per pair, and
    lengths are summed over the corpus before any ratio is taken; BLEU-n is the geometric mean of the first n precisions
    times the brevity penalty. An empty corpus raises ValueError.

    Definition: Papineni et al. 2002, with the smoothing of https://github.com/salaniz/pycocoevalcap (bleu_scorer.py).
    """
    check_pairs("BLEU", hypotheses, references)
    scores = bleu_of(bleu_counts(hypotheses, references).sum(axis=0))
    return {name: float(score) for name, score in scores.items()}


def bleu_counts(hypotheses: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """Counts of each pair, (N, 10): see `bleu_statistics`."""
    return bleu_statistics(str.split, hypotheses, references)


def bleu_of(counts: np.ndarray) -> dict[str, np.ndarray]:
    """BLEU-1 to BLEU-4 of summed counts (..., 10); each result has the leading shape."""
    ratio = (counts[..., 0] + TINY) / (counts[..., 1] + SMALL)
    brevity_penalty = np.exp(np.minimum(1 - 1 / ratio, 0))
    precisions = (counts[..., 2:6] + TINY) / (counts[..., 6:10] + SMALL)
    products = np.cumprod(precisions, axis=-1)
    return {name: products[..., i] ** (1 / (i + 1)) * brevity_penalty for i, name in enumerate(NAMES)}
