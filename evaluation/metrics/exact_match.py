"""Share of reports that are right to the last word."""

from collections.abc import Sequence


def exact_match(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Share of pairs, between 0 and 1, whose words are equal; runs of whitespace and line breaks count as one blank.

    Case and punctuation count. Two empty texts are equal. An empty corpus raises ValueError.
    """
    if not hypotheses or len(hypotheses) != len(references):
        raise ValueError(
            f"exact match: {len(hypotheses)} hypotheses, {len(references)} references; give as many, at least one"
        )
    pairs = zip(hypotheses, references, strict=True)
    return sum(hypothesis.split() == reference.split() for hypothesis, reference in pairs) / len(references)
