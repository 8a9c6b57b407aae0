"""CIDEr-D: agreement in the n-grams that are rare among the references."""

import math
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from evaluation.metrics.pairs import check_pairs

SIGMA = 6.0  # of the penalty on a difference in length, in words
ORDER = 4
DocumentFrequency = tuple[Counter[tuple[str, ...]], float]


def cider_d(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Mean CIDEr-D over pairs, from 0 to 10. Empty corpus: ValueError."""
    check_pairs("CIDEr-D", hypotheses, references)
    return float(cider_pairs(hypotheses, references).mean())


def cider_pairs(
    hypotheses: Sequence[str], references: Sequence[str], documents: DocumentFrequency | None = None
) -> np.ndarray:
    """CIDEr-D of each pair, (N,), from 0 to 10. Text is split at whitespace.

    `documents` is the `document_frequency` of all references where these are a part of them.

    Definition: Vedantam et al. 2015, as https://github.com/salaniz/pycocoevalcap computes it (no stemming, document
    frequency of an unseen n-gram 1, the length in the Gaussian penalty counted in bigrams). Where all references are
    one text every n-gram is as common as can be and the score is 0.
    """
    frequency, log_documents = document_frequency(references) if documents is None else documents
    weights = {gram: log_documents - math.log(count) for gram, count in frequency.items()}
    unseen = log_documents

    @lru_cache(maxsize=4096)
    def vectors(text: str) -> tuple[list[dict[tuple[str, ...], float]], list[float], int]:
        orders = _grams(text)
        weighted = [{gram: count * weights.get(gram, unseen) for gram, count in grams.items()} for grams in orders]
        norms = [math.sqrt(sum([weight**2 for weight in order.values()])) for order in weighted]
        return weighted, norms, orders[1].total()

    def pair(hypothesis: str, reference: str) -> float:
        ours, our_norms, our_length = vectors(hypothesis)
        theirs, their_norms, their_length = vectors(reference)
        total = 0.0
        for order in range(ORDER):
            norm = our_norms[order] * their_norms[order]
            if norm:
                other = theirs[order]
                both = [(weight, other[gram]) for gram, weight in ours[order].items() if gram in other]
                total += sum([min(weight, limit) * limit for weight, limit in both]) / norm
        return 10 * total / ORDER * math.exp(-((our_length - their_length) ** 2) / (2 * SIGMA**2))

    return np.array([pair(hypothesis, reference) for hypothesis, reference in zip(hypotheses, references, strict=True)])


def document_frequency(references: Sequence[str]) -> DocumentFrequency:
    """In how many references each n-gram occurs, and the logarithm of their number."""
    frequency: Counter[tuple[str, ...]] = Counter()
    for reference, count in Counter(references).items():
        for grams in _grams(reference):
            frequency.update(dict.fromkeys(grams, count))
    return frequency, math.log(len(references))


def _grams(text: str) -> list[Counter[tuple[str, ...]]]:
    words = text.split()
    return [Counter(zip(*(words[i:] for i in range(n)), strict=False)) for n in range(1, ORDER + 1)]
