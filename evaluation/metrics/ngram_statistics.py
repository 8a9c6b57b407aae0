"""BLEU and chrF counts of each pair by sacrebleu, so that a corpus score can be resampled by patient."""

from collections.abc import Sequence
from typing import Any

import numpy as np

CHUNK = 256  # pairs


def statistics_of(metric: Any, hypotheses: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """Counts of each pair, (N, K) float64; their sum over pairs gives sacrebleu's corpus score.

    `metric` is a sacrebleu BLEU, K = 2 + 2 orders (lengths of hypothesis and reference, matched n-grams, n-grams of the
    hypothesis), or a CHRF, K = 3 orders (n-grams of hypothesis, of reference, matched). sacrebleu offers these counts
    to its own significance tests only, by this method.
    """
    parts = [  # sacrebleu keeps the n-grams of all references that it is given at once
        metric._extract_corpus_statistics(list(hypotheses[i : i + CHUNK]), [list(references[i : i + CHUNK])])
        for i in range(0, len(references), CHUNK)
    ]
    return np.concatenate([np.array(part, dtype=np.float64) for part in parts])
