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
            draw_confusion(folder / f"confusion_{name}.png", np.array(found["confusion"]), class_names[name], name)


def draw_confusion(picture: Path, confusion: np.ndarray, class_names: Sequence[str], title: str) -> None:
    """Draw a confusion matrix (C, C): counts as numbers, the share of each true class as colour."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    side = min(30.0, 3 + 0.45 * len(class_names))
    figure, axes = pyplot.subplots(figsize=(side + 1, side), layout="constrained")
    shares = confusion / np.maximum(1, confusion.sum(axis=1, keepdims=True))
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    places = range(len(class_names))
    shown = [name if len(name) <= 40 else name[:39] + "…" for name in class_names]
    axes.set_xticks(places, shown, rotation=60, ha="right", fontsize=8)
    axes.set_yticks(places, shown, fontsize=8)
    for row, column in zip(*np.nonzero(confusion), strict=True):
        color = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, confusion[row, column], ha="center", va="center", fontsize=8, color=color)
    axes.set(xlabel="predicted", ylabel="true", title=title)
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    with atomic_path(picture) as partial:
        figure.savefig(partial, dpi=110, format="png")
    pyplot.close(figure)


def table(scores: dict[str, dict[str, Any]]) -> str:
    """The scores for the terminal: a line a label, and a line a class below it."""
    lines = [f"{'':<48}{'records':>9}{'balanced accuracy':>19}{'F1':>8}"]
    for label, found in scores.items():
        if not found["n"]:
            lines.append(f"{label:<48}{0:>9}")
            continue
        lines.append(f"{label:<48}{found['n']:>9}{found['balanced_accuracy']:>19.4f}{found['macro_f1']:>8.4f}")
        for name, f1 in found["f1"].items():
            lines.append(f"  {name[:45]:<46}{found['support'][name]:>9}{'':>19}{f1:>8.4f}")
    return "\n".join(lines)
