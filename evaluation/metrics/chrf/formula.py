"""chrF: F-score of character n-grams, equal to sacrebleu's."""

from collections.abc import Sequence

import numpy as np

from evaluation.metrics.ngram_statistics import chrf_statistics
from evaluation.metrics.pairs import check_pairs

BETA = 2


def chrf(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Corpus chrF2 between 0 and 1, a hundredth of sacrebleu's figure (Popović 2015). Empty corpus: ValueError."""
    check_pairs("chrF", hypotheses, references)
    return float(chrf_of(chrf_counts(hypotheses, references).sum(axis=0)))


def chrf_counts(hypotheses: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """Counts of each pair, (N, 18): see `chrf_statistics`."""
    return chrf_statistics(hypotheses, references)


def chrf_of(counts: np.ndarray) -> np.ndarray:
    """chrF of summed counts (..., 18), between 0 and 1, with the leading shape.

    Precision and recall are means over the orders (1 to 6) that both sides have.
    """
    hypothesis, reference, matched = counts[..., 0::3], counts[..., 1::3], counts[..., 2::3]
    counted = (hypothesis > 0) & (reference > 0)
    num_orders = np.maximum(counted.sum(axis=-1), 1)
    precision = (np.where(counted, matched, 0) / np.maximum(hypothesis, 1)).sum(axis=-1) / num_orders
    recall = (np.where(counted, matched, 0) / np.maximum(reference, 1)).sum(axis=-1) / num_orders
    denominator = BETA**2 * precision + recall
    return np.where(
        denominator > 0, (1 + BETA**2) * precision * recall / np.where(denominator > 0, denominator, 1), 0.0
    )
