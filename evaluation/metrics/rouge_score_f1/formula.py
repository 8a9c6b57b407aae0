"""ROUGE-1, ROUGE-2 and ROUGE-L F1 as the library rouge-score defines them."""

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from evaluation.metrics.coco_rouge.formula import lcs_length
from evaluation.metrics.pairs import check_pairs

NAMES = ("rouge_1_f1", "rouge_2_f1", "rouge_l_f1")


def rouge_score_f1(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Mean F1 over pairs of ROUGE-1, -2 and -L, each between 0 and 1. Empty corpus: ValueError.

    Text is lower-cased and split into runs of letters and digits by rouge-score's tokenizer, without stemming.
    """
    check_pairs("ROUGE", hypotheses, references)
    means = rouge_pairs(hypotheses, references).mean(axis=0)
    return {name: float(mean) for name, mean in zip(NAMES, means, strict=True)}


def rouge_pairs(hypotheses: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """F1 of each pair, (N, 3). Equal to `rouge_scorer.RougeScorer`, whose table of common subsequences is slow."""
    from rouge_score.tokenizers import DefaultTokenizer

    words_of = lru_cache(maxsize=4096)(DefaultTokenizer(use_stemmer=False).tokenize)
    rows = np.zeros((len(hypotheses), len(NAMES)))
    for row, hypothesis, reference in zip(rows, hypotheses, references, strict=True):
        words, expected = words_of(hypothesis), words_of(reference)
        row[0] = _f1((Counter(words) & Counter(expected)).total(), len(words), len(expected))
        pairs, expected_pairs = list(zip(words, words[1:])), list(zip(expected, expected[1:]))  # noqa: B905
        row[1] = _f1((Counter(pairs) & Counter(expected_pairs)).total(), len(pairs), len(expected_pairs))
        row[2] = _f1(lcs_length(words, expected), len(words), len(expected))
    return rows


def _f1(common: int, of_hypothesis: int, of_reference: int) -> float:
    return 2 * common / (of_hypothesis + of_reference) if common else 0.0
