"""Cosine of the embeddings of two texts."""

from collections.abc import Sequence

import numpy as np

from evaluation.metrics.pairs import check_pairs
from evaluation.metrics.reg_score.formula import cosine
from evaluation.metrics.text_encoder import TextEncoder


def embedding_cosine(hypotheses: Sequence[str], references: Sequence[str], encoder: TextEncoder) -> float:
    """Mean cosine over pairs of mean-pooled last hidden states, from -1 to 1. Empty corpus: ValueError."""
    check_pairs("embedding cosine", hypotheses, references)
    return float(cosine_pairs(hypotheses, references, encoder).mean())


def cosine_pairs(hypotheses: Sequence[str], references: Sequence[str], encoder: TextEncoder) -> np.ndarray:
    """Cosine of each pair, (N,); each distinct text is embedded once. An empty text scores 0."""
    distinct = sorted({*hypotheses, *references})
    rows, place = encoder.mean_pooled(distinct), {text: i for i, text in enumerate(distinct)}
    pairs = zip(hypotheses, references, strict=True)
    return np.array([cosine(rows[place[a]], rows[place[b]]) if a.strip() and b.strip() else 0.0 for a, b in pairs])
