"""The ranking score of the REG 2025 challenge: 0.15 (ROUGE + BLEU) + 0.40 KEY + 0.30 EMB, the mean over cases."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from evaluation.metrics.coco_rouge.formula import lcs_length
from evaluation.metrics.pairs import check_pairs

WEIGHTS = {"rouge": 0.15, "bleu": 0.15, "key": 0.40, "emb": 0.30}
SHORTEST_KEYWORD = 3  # characters
ENTITY_MODEL = "en_core_sci_lg"
Entities = Callable[[str], frozenset[str]]


def reg_score(
    hypotheses: Sequence[str],
    references: Sequence[str],
    *,
    entities: Entities | None = None,
    embed: Callable[[Sequence[str]], np.ndarray] | None = None,
) -> dict[str, Any]:
    """Components of the REG score over a corpus, and the score where all of them could be computed.

    `entities` gives the keywords of a text (`spacy_entities`), `embed` an (N, H) array of text embeddings. Returns
    `reg_rouge`, `reg_bleu`, `reg_key`, `reg_emb` (None where not computed), `reg_score` (None unless whole),
    `reg_ceiling` (the score that the references themselves would get, over the components computed), `reg_status`.
    Empty corpus: ValueError.
    """
    check_pairs("REG score", hypotheses, references)
    parts = reg_parts(hypotheses, references, entities=entities, embed=embed)
    ceiling = reg_parts(references, references, entities=entities, embed=embed)
    means = {name: float(values.mean()) for name, values in parts.items()}
    missing = [name for name in WEIGHTS if name not in parts]
    whole = not missing
    return {
        **{f"reg_{name}": means.get(name) for name in WEIGHTS},
        "reg_score": float(sum(WEIGHTS[name] * means[name] for name in WEIGHTS)) if whole else None,
        "reg_ceiling": {
            "weight_computed": round(sum(WEIGHTS[name] for name in parts), 2),
            "ceiling": float(sum(WEIGHTS[name] * ceiling[name].mean() for name in parts)),
        },
        "reg_status": reg_status(missing),
    }


def reg_status(missing: Sequence[str]) -> str:
    """ "whole", or which components were not computed."""
    names = " and ".join(name.upper() for name in missing)
    return f"partial: {names} not computed" if missing else "whole"


def reg_parts(
    hypotheses: Sequence[str],
    references: Sequence[str],
    *,
    entities: Entities | None = None,
    embed: Callable[[Sequence[str]], np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Components of each case, (N,) each between 0 and 1: rouge, bleu, and key and emb where their models are given."""
    pairs = list(zip(hypotheses, references, strict=True))
    parts = {
        "rouge": np.array([case_rouge(*pair) for pair in pairs]),
        "bleu": np.array([four_gram_precision(*pair) for pair in pairs]),
    }
    if entities is not None:
        known = {text: entities(text) for text in {*hypotheses, *references}}
        parts["key"] = np.array([jaccard(known[a], known[b]) for a, b in pairs])
    if embed is not None:
        distinct = sorted({*hypotheses, *references})
        rows, place = embed(distinct), {text: i for i, text in enumerate(distinct)}
        cosines = np.array([cosine(rows[place[a]], rows[place[b]]) for a, b in pairs])
        parts["emb"] = np.clip((cosines - 0.5) / 0.5, 0, 1)
    return parts


def case_rouge(hypothesis: str, reference: str) -> float:
    """ROUGE-L F1 of lower-cased text split at whitespace; 0 when either is empty."""
    ours, theirs = hypothesis.lower().split(), reference.lower().split()
    common = lcs_length(ours, theirs)
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0


def four_gram_precision(hypothesis: str, reference: str) -> float:
    """Share of the hypothesis' 4-grams that the reference has, clipped; 0 when either has fewer than 4 words.

    Case counts; there is no brevity penalty.
    """
    ours, theirs = _four_grams(hypothesis), _four_grams(reference)
    return (ours & theirs).total() / ours.total() if ours and theirs else 0.0


def _four_grams(text: str) -> Counter[tuple[str, ...]]:
    words = text.split()
    return Counter(zip(words, words[1:], words[2:], words[3:], strict=False))


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """Shared over all keywords; 0 when there are none."""
    return len(a & b) / len(a | b) if a | b else 0.0


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of two vectors; 0 when either is zero."""
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norm if norm else 0.0


def spacy_entities(pipeline: Any) -> Entities:
    """Keywords by a spaCy pipeline: its entities, lower-cased, of at least 3 characters."""

    def entities(text: str) -> frozenset[str]:
        words = (entity.text.lower().strip() for entity in pipeline(text).ents)
        return frozenset(word for word in words if len(word) >= SHORTEST_KEYWORD)

    return entities


def load_entities(model: str = ENTITY_MODEL) -> Entities:
    """Open a spaCy model by name or folder. ValueError says what to install when it is not there."""
    try:
        import spacy
    except ImportError:
        raise ValueError(
            f"--entity_model {model}: spaCy is not installed; pip install 'slidescribe[keywords]'"
        ) from None
    try:
        return spacy_entities(spacy.load(model))
    except OSError:
        raise ValueError(
            f"--entity_model {model}: no such spaCy model; install it (scispaCy's releases "
            f"have {ENTITY_MODEL}) or give its folder"
        ) from None
