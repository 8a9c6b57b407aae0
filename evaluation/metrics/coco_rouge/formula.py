"""ROUGE-L by the definition that report-generation papers use (pycocoevalcap's `Rouge`)."""

from collections.abc import Sequence

from evaluation.metrics.pairs import check_pairs

# pycocoevalcap's weight of recall against precision; rouge-score uses 1, so the two figures differ.
BETA = 1.2


def lcs_length(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence of two word sequences.

    Bit-parallel (Hyyrö 2004, "Bit-parallel LCS-length computation revisited"): one row of the usual table is one Python
    integer, which makes 10,000 pairs take well under a second.
    """
    positions: dict[str, int] = {}
    for i, word in enumerate(a):
        positions[word] = positions.get(word, 0) | 1 << i
    full = (1 << len(a)) - 1
    row = full
    for word in b:
        matched = row & positions.get(word, 0)
        row = (row + matched | row - matched) & full
    return len(a) - row.bit_count()


def coco_words(text: str) -> list[str]:
    """Split as pycocoevalcap does, at every single blank, so that a double blank leaves an empty word between its two.

    Published figures contain those empty words. Lines are joined by one blank first: the indented lines of a pathology
    report would otherwise match by their indentation (0.28 instead of 0.22 for a constant report on REG 2025).
    """
    lines = (line.strip() for line in text.splitlines())
    joined = " ".join(line for line in lines if line)
    return joined.split(" ") if joined else []


def rouge_l_pair(hypothesis: str, reference: str) -> float:
    """ROUGE-L F (beta 1.2) of one pair, between 0 and 1; 0 when either text is empty."""
    hypothesis_words, reference_words = coco_words(hypothesis), coco_words(reference)
    common = lcs_length(hypothesis_words, reference_words)
    if common == 0:
        return 0.0
    precision, recall = common / len(hypothesis_words), common / len(reference_words)
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def coco_rouge_l(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Mean ROUGE-L F (beta 1.2) over pairs. An empty corpus raises ValueError.

    Definition: Lin 2004 with the F weight of https://github.com/salaniz/pycocoevalcap (rouge.py).
    """
    check_pairs("ROUGE", hypotheses, references)
    return sum(map(rouge_l_pair, hypotheses, references)) / len(references)
