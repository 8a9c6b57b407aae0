"""Corpus BLEU as sacrebleu reports it: tokenizer 13a, case kept, exponential smoothing."""

from collections.abc import Sequence

import numpy as np

from evaluation.metrics.ngram_statistics import bleu_statistics
from evaluation.metrics.pairs import check_pairs

ORDER = 4


def sacre_bleu(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """BLEU of a corpus between 0 and 1, a hundredth of sacrebleu's figure (Post 2018). Empty corpus: ValueError."""
    check_pairs("sacreBLEU", hypotheses, references)
    return float(sacre_bleu_of(sacre_bleu_counts(hypotheses, references).sum(axis=0)))


def sacre_bleu_counts(hypotheses: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """Counts of each pair, (N, 10): see `bleu_statistics`."""
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    tokenize = Tokenizer13a()
    return bleu_statistics(lambda text: tokenize(text.rstrip()).split(), hypotheses, references)


def sacre_bleu_of(counts: np.ndarray) -> np.ndarray:
    """BLEU of summed counts (..., 10), between 0 and 1, with the leading shape."""
    lengths, matched, total = counts[..., :2], counts[..., 2:6], counts[..., 6:10]
    unmatched = (matched == 0) & (total > 0)
    halvings = np.cumsum(unmatched, axis=-1)  # each order without a match halves the count assumed for it
    precisions = np.where(unmatched, 0.5**halvings, matched) / np.maximum(total, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(precisions).mean(axis=-1)
        brevity = np.minimum(1 - lengths[..., 1] / lengths[..., 0], 0)
    scored = matched.any(axis=-1) & (total > 0).all(axis=-1)
    return np.where(scored, np.exp(np.where(scored, brevity + logs, 0)), 0.0)
