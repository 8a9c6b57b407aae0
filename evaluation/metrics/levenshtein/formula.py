"""Levenshtein ratio of characters, by rapidfuzz."""

from collections.abc import Sequence

import numpy as np

from evaluation.metrics.pairs import check_pairs


def levenshtein_ratio(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Mean over pairs of 1 - distance / length of the longer text; 1 for two empty texts. Empty corpus: ValueError.

    Runs of whitespace count as one blank.
    """
    check_pairs("Levenshtein ratio", hypotheses, references)
    return float(levenshtein_pairs(hypotheses, references).mean())


def levenshtein_pairs(hypotheses: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """Ratio of each pair, (N,)."""
    from rapidfuzz.distance import Levenshtein

    pairs = zip(hypotheses, references, strict=True)
    return np.array([Levenshtein.normalized_similarity(" ".join(a.split()), " ".join(b.split())) for a, b in pairs])
