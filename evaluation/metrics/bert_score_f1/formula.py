"""BERTScore: greedy matching of the token embeddings of two texts."""

from collections.abc import Sequence

import numpy as np

from evaluation.metrics.pairs import check_pairs
from evaluation.metrics.text_encoder import TextEncoder

NAMES = ("bert_score_precision", "bert_score_recall", "bert_score_f1")


def bert_score(
    hypotheses: Sequence[str], references: Sequence[str], encoder: TextEncoder, *, layer: int = -1
) -> dict[str, float]:
    """Mean BERTScore precision, recall and F1 over pairs. Empty corpus: ValueError."""
    check_pairs("BERTScore", hypotheses, references)
    means = bert_score_pairs(hypotheses, references, encoder, layer=layer).mean(axis=0)
    return {name: float(mean) for name, mean in zip(NAMES, means, strict=True)}


def bert_score_pairs(
    hypotheses: Sequence[str], references: Sequence[str], encoder: TextEncoder, *, layer: int = -1
) -> np.ndarray:
    """Precision, recall and F1 of each pair, (N, 3); 0 where either text is empty.

    Definition: Zhang et al. 2020 without idf weights and rescaling. As in the library bert-score, special tokens may be
    matched but do not count themselves. `layer` counts the model's hidden states from 0, or from the end.
    """
    texts = sorted({*hypotheses, *references})
    states: list[tuple[np.ndarray, np.ndarray]] = [(np.empty(0), np.empty(0))] * len(texts)
    for places, hidden, mask, words in encoder.batches(texts, layer):
        unit = (hidden / hidden.norm(dim=-1, keepdim=True).clamp(min=1e-12)).cpu().numpy()
        for row, place in enumerate(places):
            kept = mask[row].cpu().numpy()
            states[place] = (unit[row][kept], words[row].cpu().numpy()[kept])
    place_of = {text: place for place, text in enumerate(texts)}

    def pair(hypothesis: str, reference: str) -> tuple[float, float, float]:
        (ours, our_words), (theirs, their_words) = states[place_of[hypothesis]], states[place_of[reference]]
        if not our_words.any() or not their_words.any():
            return 0.0, 0.0, 0.0
        similarity = ours @ theirs.T
        precision = float(similarity.max(axis=1)[our_words].mean())
        recall = float(similarity.max(axis=0)[their_words].mean())
        return precision, recall, 2 * precision * recall / (precision + recall) if precision + recall else 0.0

    known = {key: pair(*key) for key in set(zip(hypotheses, references, strict=True))}
    return np.array([known[key] for key in zip(hypotheses, references, strict=True)])
