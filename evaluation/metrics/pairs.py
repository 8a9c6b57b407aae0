"""What all metrics check of their input."""

from collections.abc import Sequence


def check_pairs(metric: str, hypotheses: Sequence[str], references: Sequence[str]) -> None:
    """Raise ValueError unless there are as many hypotheses as references, and at least one."""
    if not hypotheses or len(hypotheses) != len(references):
        raise ValueError(
            f"{metric}: {len(hypotheses)} hypotheses, {len(references)} references; give as many, at least one"
        )
