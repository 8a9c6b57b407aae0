"""The metrics that training may choose its best model by: quick, and better when higher."""

from collections.abc import Callable, Sequence

from evaluation.metrics.coco_bleu.formula import coco_bleu
from evaluation.metrics.coco_rouge.formula import coco_rouge_l
from evaluation.metrics.exact_match.formula import exact_match


def bleu_4(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """BLEU-4 alone."""
    return coco_bleu(hypotheses, references)["bleu_4"]


METRICS: dict[str, Callable[[Sequence[str], Sequence[str]], float]] = {
    "rouge_l": coco_rouge_l,
    "bleu_4": bleu_4,
    "exact_match": exact_match,
}
