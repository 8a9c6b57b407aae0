"""What the local modules of the library evaluate have in common."""

import evaluate
from datasets import Features, Value


def text_pairs_info(description: str | None, citation: str) -> evaluate.MetricInfo:
    """Description of a metric of predicted and reference texts, one reference each."""
    return evaluate.MetricInfo(
        description=description or "",
        citation=citation,
        features=Features({"predictions": Value("string"), "references": Value("string")}),
    )
