"""How well the fields of predicted reports agree with those of the references."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from evaluation.fields import BEHAVIORS, FIELD_NAMES, ReportFields
from evaluation.resampling import intervals, sums_by_patient

# Fields with an order, and the places of their values in it.
ORDERS: dict[str, tuple[Any, ...]] = {
    "behavior": BEHAVIORS,
    "nottingham_grade": (1, 2, 3),
    "nottingham_total": (3, 4, 5, 6, 7, 8, 9),
    "nottingham_tubules": (1, 2, 3),
    "nottingham_nuclei": (1, 2, 3),
    "nottingham_mitoses": (1, 2, 3),
    "gleason_score": (2, 3, 4, 5, 6, 7, 8, 9, 10),
    "gleason_primary": (1, 2, 3, 4, 5),
    "gleason_secondary": (1, 2, 3, 4, 5),
    "grade_group": (1, 2, 3, 4, 5),
    "who_grade": ("low", "high"),
    "differentiation": ("well", "moderate", "poor", "undifferentiated"),
    "dysplasia": ("absent", "low", "high"),
    "cin": (1, 2, 3),
    "neuroendocrine_grade": (1, 2, 3),
    "nuclear_grade": ("low", "intermediate", "high"),
    "invasion_depth": (
        "muscularis mucosae",
        "subepithelial connective tissue",
        "submucosa",
        "muscle proper",
        "subserosa",
        "serosa",
        "extraprostatic",
    ),
}
PERCENTAGES = ("tumor_volume", "gleason_pattern_4", "gleason_pattern_5")
LISTS = ("diagnoses", "features", "growth_pattern")
NOT_STATED = "not stated"


def field_label(name: str) -> str:
    """Words for a field's name."""
    return {"cin": "CIN", "who_grade": "WHO grade", "nottingham_grade": "Nottingham grade"}.get(
        name, name.replace("_", " ").replace("gleason", "Gleason").replace("nottingham", "Nottingham")
    )


def value_of(fields: ReportFields, name: str) -> Any:
    """A field as a value to compare: sorted for lists, None where nothing is stated."""
    value = getattr(fields, name)
    if name in LISTS:
        return tuple(sorted(value)) or None if value else None
    return value


def rank_of(name: str, value: Any) -> int | None:
    """Place of a value in its field's order, or None for a value without one."""
    return ORDERS[name].index(value) if value in ORDERS[name] else None


def field_hits(predicted: Sequence[ReportFields], expected: Sequence[ReportFields]) -> dict[str, np.ndarray]:
    """For each field that some reference states: 1 where the prediction agrees, 0 where not, NaN where not stated."""
    hits = {}
    for name in FIELD_NAMES:
        ours = [value_of(fields, name) for fields in predicted]
        theirs = [value_of(fields, name) for fields in expected]
        stated = np.array([value is not None for value in theirs])
        if stated.any():
            equal = np.array([float(a == b) for a, b in zip(ours, theirs, strict=True)])
            hits[name] = np.where(stated, equal, np.nan)
    return hits


def score_fields(predicted: Sequence[ReportFields], expected: Sequence[ReportFields]) -> dict[str, dict[str, Any]]:
    """Agreement of every field that is stated anywhere.

    For each: `n`, references that state it; `accuracy` among them; `left_out`, how many of them whose prediction says
    nothing; `invented`, predictions that state it where the reference does not; `macro_f1` over the values of both
    sides, silence being a value; for ordered fields `weighted_kappa` (quadratic; Cohen 1968) where both state it; for
    percentages `mean_absolute_error` and `median_absolute_error` in points where both state it. For diagnoses also the
    mean `f1` of the sets. Figures that are undefined are None.
    """
    scores = {}
    for name in FIELD_NAMES:
        ours = [value_of(fields, name) for fields in predicted]
        theirs = [value_of(fields, name) for fields in expected]
        if any(value is not None for value in (*ours, *theirs)):
            scores[name] = _score_field(name, ours, theirs)
    return scores


def _score_field(name: str, ours: list[Any], theirs: list[Any]) -> dict[str, Any]:
    stated = [(a, b) for a, b in zip(ours, theirs, strict=True) if b is not None]
    both = [(a, b) for a, b in stated if a is not None]
    scores: dict[str, Any] = {
        "n": len(stated),
        "accuracy": float(np.mean([a == b for a, b in stated])) if stated else None,
        "left_out": len(stated) - len(both),
        "invented": sum(a is not None for a, b in zip(ours, theirs, strict=True) if b is None),
    }
    if name in PERCENTAGES:
        errors = [abs(a - b) for a, b in both]
        scores["mean_absolute_error"] = float(np.mean(errors)) if errors else None
        scores["median_absolute_error"] = float(np.median(errors)) if errors else None
        return scores
    scores["macro_f1"] = macro_f1(ours, theirs)
    if name in ORDERS:
        ranks = [(rank_of(name, a), rank_of(name, b)) for a, b in both]
        scores["weighted_kappa"] = weighted_kappa([(a, b) for a, b in ranks if a is not None and b is not None])
    if name in LISTS:
        scores["f1"] = float(np.mean([_set_f1(a, b) for a, b in stated])) if stated else None
    return scores


def accuracy_intervals(
    hits: dict[str, np.ndarray], patients: Sequence[str], *, num_resamples: int, seed: int = 0
) -> dict[str, list[float]]:
    """95 % interval of each field's accuracy over patients drawn with replacement; `hits` are of `field_hits`."""
    stated = [~np.isnan(values) for values in hits.values()]
    columns = [np.where(said, values, 0) for said, values in zip(stated, hits.values(), strict=True)]
    sums = sums_by_patient(np.stack([*columns, *stated], axis=1).astype(float), patients)

    def accuracies(drawn: np.ndarray) -> dict[str, np.ndarray]:
        with np.errstate(invalid="ignore"):
            shares = drawn[..., : len(hits)] / drawn[..., len(hits) :]
        return {name: shares[..., place] for place, name in enumerate(hits)}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        found = intervals(sums, accuracies, num_resamples=num_resamples, seed=seed)
    return {name: low_high for name, low_high in found.items() if np.isfinite(low_high).all()}


def macro_f1(ours: Sequence[Any], theirs: Sequence[Any]) -> float:
    """Mean F1 over all values of either side; cases where both say nothing are left out."""
    from sklearn.metrics import f1_score

    pairs = [(str(a), str(b)) for a, b in zip(ours, theirs, strict=True) if a is not None or b is not None]
    written, expected = zip(*pairs, strict=True)
    labels = sorted({*written, *expected} - {"None"})
    return float(f1_score(expected, written, labels=labels, average="macro", zero_division=0))


def weighted_kappa(ranks: Sequence[tuple[int, int]]) -> float | None:
    """Quadratic weighted kappa of pairs of ranks; None where it is undefined (no pairs, or one value only)."""
    from sklearn.metrics import cohen_kappa_score

    if not ranks:
        return None
    ours, theirs = zip(*ranks, strict=True)
    values = {*ours, *theirs}
    if len(values) < 2:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kappa = cohen_kappa_score(ours, theirs, labels=list(range(max(values) + 1)), weights="quadratic")
    return float(kappa) if np.isfinite(kappa) else None


def _set_f1(ours: tuple[str, ...] | None, theirs: tuple[str, ...]) -> float:
    common = len({*(ours or ())} & {*theirs})
    return 2 * common / (len({*(ours or ())}) + len({*theirs})) if common else 0.0


def confusion(name: str, predicted: Sequence[ReportFields], expected: Sequence[ReportFields], most: int = 14):
    """(row labels, column labels, counts) of a field: rows are references, columns predictions.

    Rare values join in "other", and predictions that say nothing have a column of their own. Only cases whose reference
    states the field count; `counts` is int. None where nothing is stated.
    """
    pairs = [(value_of(a, name), value_of(b, name)) for a, b in zip(predicted, expected, strict=True)]
    named = [(NOT_STATED if a is None else _label(a), _label(b)) for a, b in pairs if b is not None]
    if not named:
        return None
    if name in ORDERS:
        used = {label for pair in named for label in pair}
        scale = [str(value) for value in ORDERS[name]]
        places = [place for place, label in enumerate(scale) if label in used]
        labels = scale[places[0] : places[-1] + 1] if places else []  # a scale has no gaps
    else:
        frequent: dict[str, int] = {}
        for _, theirs in named:
            frequent[theirs] = frequent.get(theirs, 0) + 1
        labels = sorted(frequent, key=lambda label: (-frequent[label], label))[:most]
    if any(_place(theirs, labels) == "other" or _place(ours, labels) == "other" for ours, theirs in named):
        labels.append("other")
    columns = [*labels, NOT_STATED] if any(ours == NOT_STATED for ours, _ in named) else labels
    counts = np.zeros((len(labels), len(columns)), dtype=int)
    for ours, theirs in named:
        counts[labels.index(_place(theirs, labels)), columns.index(_place(ours, labels))] += 1
    return labels, columns, counts


def _label(value: Any) -> str:
    return " + ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _place(label: str, labels: Sequence[str]) -> str:
    return label if label in labels or label == NOT_STATED else "other"
