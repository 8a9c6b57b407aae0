"""Corpus BLEU-1 to BLEU-4 by the definition that report-generation papers use (pycocoevalcap's `Bleu`)."""

import math
from collections.abc import Sequence

# pycocoevalcap's constants: they keep a count of zero from making log(0), and published figures contain them.
TINY, SMALL = 1e-15, 1e-9


def coco_bleu(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Score a corpus; returns `{"bleu_1": …, …, "bleu_4": …}`, each between 0 and 1.

    Text is split at whitespace and nothing else (no PTB tokenizer, case kept). N-gram counts, clipped per pair, and
    lengths are summed over the corpus before any ratio is taken; BLEU-n is the geometric mean of the first n precisions
    times the brevity penalty. An empty corpus raises ValueError.

    Definition: Papineni et al. 2002, with the smoothing of https://github.com/salaniz/pycocoevalcap (bleu_scorer.py);
    the counts come from sacrebleu.
    """
    from sacrebleu.metrics import BLEU

    if not hypotheses or len(hypotheses) != len(references):
        raise ValueError(
            f"BLEU: {len(hypotheses)} hypotheses, {len(references)} references; give as many, at least one"
        )
    counts = BLEU(tokenize="none", force=True).corpus_score(list(hypotheses), [list(references)])
    ratio = (counts.sys_len + TINY) / (counts.ref_len + SMALL)
    brevity_penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    product, scores = 1.0, {}
    for order, (matched, total) in enumerate(zip(counts.counts, counts.totals, strict=True), start=1):
        product *= (matched + TINY) / (total + SMALL)
        scores[f"bleu_{order}"] = product ** (1 / order) * brevity_penalty
    return scores
