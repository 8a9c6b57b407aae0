"""How well a classifier's predictions agree with the labels: scores, a table of cases, confusion matrices as pictures.

Shapes: N records, C classes of a label.
"""

import csv
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slide_features import atomic_path
from stage0_encoder.labels import UNLABELLED


def score_label(probabilities: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """Scores of one label over the records that have it; None where no record has.

    Args:
        probabilities: (N, C) of each class.
        labels: (N,) int64, `UNLABELLED` where there is none.
        class_names: of the C classes.

    Returns:
        ``n``, ``accuracy``, ``balanced_accuracy`` (the mean recall of the classes that occur), ``chance`` (what a guess
        would have of it), ``macro_f1`` over the classes that occur, ``f1``, ``support`` by class, and ``confusion``,
        rows of true and columns of predicted classes.
    """
    from sklearn.metrics import balanced_accuracy_score, confusion_matrix, f1_score

    known = labels != UNLABELLED
    if not known.any():
        return {"n": 0, "accuracy": None, "balanced_accuracy": None, "macro_f1": None}
    true, predicted = labels[known], probabilities[known].argmax(axis=1)
    places = np.arange(len(class_names))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="y_pred contains classes not in y_true")
        warnings.filterwarnings("ignore", message="A single label was found")
        balanced = balanced_accuracy_score(true, predicted)
    f1 = f1_score(true, predicted, labels=places, average=None, zero_division=0)
    support = np.bincount(true, minlength=len(places))
    return {
        "n": int(known.sum()),
        "accuracy": float((true == predicted).mean()),
        "balanced_accuracy": float(balanced),
        "chance": 1 / int((support > 0).sum()),
        "macro_f1": float(f1[support > 0].mean()),
        "f1": dict(zip(class_names, f1.tolist(), strict=True)),
        "support": dict(zip(class_names, support.tolist(), strict=True)),
        "confusion": confusion_matrix(true, predicted, labels=places).tolist(),
    }


def score_all(
    probabilities: Sequence[np.ndarray], labels: np.ndarray, class_names: dict[str, list[str]]
) -> dict[str, dict[str, Any]]:
    """Scores of each label; ``probabilities`` of each label (N, C), ``labels`` (N, L)."""
    return {
        name: score_label(probabilities[number], labels[:, number], names)
        for number, (name, names) in enumerate(class_names.items())
    }


def for_log(scores: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The scores as numbers for the log; ``val_balanced_accuracy`` is the mean over the labels."""
    flat = {
        f"val_{label}_{name}": found[name]
        for label, found in scores.items()
        for name in ("balanced_accuracy", "macro_f1")
        if found[name] is not None
    }
    balanced = [found["balanced_accuracy"] for found in scores.values() if found["balanced_accuracy"] is not None]
    return flat | ({"val_balanced_accuracy": float(np.mean(balanced))} if balanced else {})


def save_scores(
    folder: Path,
    scores: dict[str, dict[str, Any]],
    ids: Sequence[str],
    probabilities: Sequence[np.ndarray],
    labels: np.ndarray,
    class_names: dict[str, list[str]],
) -> None:
    """Write ``scores.json``, ``predictions.csv`` (a row a record), and ``confusion_<label>.png`` of each label."""
    with atomic_path(folder / "scores.json") as partial:
        partial.write_text(json.dumps(scores, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    with atomic_path(folder / "predictions.csv") as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        columns = [f"{name}{part}" for name in class_names for part in ("", "_predicted", "_probability")]
        writer.writerow(["id", *columns])
        for row, record_id in enumerate(ids):
            cells = []
            for number, names in enumerate(class_names.values()):
                best, true = int(probabilities[number][row].argmax()), labels[row, number]
                stated = "" if true == UNLABELLED else names[true]
                cells += [stated, names[best], f"{probabilities[number][row][best]:.4f}"]
            writer.writerow([record_id, *cells])
    for name, found in scores.items():
        if found["n"]:
            with atomic_path(folder / f"confusion_{name}.png") as partial:
                partial.write_bytes(confusion_picture(found, class_names[name], name))


def confusion_picture(found: dict[str, Any], class_names: Sequence[str], title: str) -> bytes:
    """PNG of a label's confusion matrix: true classes that occur as rows, those and predicted ones as columns."""
    from evaluation.figures import confusion_figure, picture

    counts = np.array(found["confusion"])
    rows = np.nonzero(counts.sum(axis=1))[0]
    columns = np.nonzero(counts.sum(axis=0) + counts.sum(axis=1))[0]
    names = [[class_names[place] for place in places] for places in (rows, columns)]
    return picture(confusion_figure(title, *names, counts[np.ix_(rows, columns)]), "png")


def table(scores: dict[str, dict[str, Any]]) -> str:
    """The scores for the terminal: a line a label, and below it a line for each class that occurs."""
    lines = [f"{'':<48}{'records':>9}{'balanced accuracy':>19}{'chance':>9}{'F1':>9}"]
    for label, found in scores.items():
        if not found["n"]:
            lines.append(f"{label:<48}{0:>9}")
            continue
        balanced, chance = found["balanced_accuracy"], found["chance"]
        lines.append(f"{label:<48}{found['n']:>9}{balanced:>19.4f}{chance:>9.4f}{found['macro_f1']:>9.4f}")
        occurring = {name: count for name, count in found["support"].items() if count}
        for name, count in occurring.items():
            lines.append(f"  {name[:45]:<46}{count:>9}{'':>28}{found['f1'][name]:>9.4f}")
        if missing := len(found["support"]) - len(occurring):
            lines.append(f"  ({missing} more {'class has' if missing == 1 else 'classes have'} no validation record)")
    return "\n".join(lines)
