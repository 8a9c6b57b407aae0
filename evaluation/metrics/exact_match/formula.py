"""Share of reports that are right to the last word."""

from collections.abc import Sequence

from evaluation.metrics.pairs import check_pairs


def exact_match(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Share of pairs, between 0 and 1, whose words are equal; runs of whitespace and line breaks count as one blank.

    Case and punctuation count. Two empty texts are equal. An empty corpus raises ValueError.
    """
    check_pairs("exact match", hypotheses, references)
    return sum(map(is_exact, hypotheses, references)) / len(references)


def is_exact(hypothesis: str, reference: str) -> bool:
    """Whether the words of two texts are the same."""
    return hypothesis.split() == reference.split()
