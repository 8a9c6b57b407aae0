"""The files that score.py writes."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import Namespace

from evaluation.clinical import Clinical
from evaluation.field_scores import confusion, field_label
from evaluation.figures import (
    calibration_figure,
    confusion_figure,
    distribution_figure,
    mistakes_figure,
    picture,
    survival_figure,
)
from evaluation.page import write_page
from evaluation.report_files import PairedReports
from evaluation.survival import groups_of
from evaluation.text_metrics import PairScores
from slide_features import atomic_path

CONFUSIONS = ("behavior", "organ", "diagnoses", "grade_group", "nottingham_grade", "differentiation", "who_grade",
              "dysplasia", "cin", "invasion_depth", "muscle_proper")  # fmt: skip
DISTRIBUTIONS = ("rouge_l", "meteor", "cider_d", "levenshtein_ratio", "reg_rouge", "reg_bleu")


def save_results(
    args: Namespace, pairs: PairedReports, metrics: dict[str, Any], scores: PairScores, clinical: Clinical
) -> None:
    """Write metrics.json, mistakes.json, cases.csv, pictures/ and report.html; each appears whole or not at all."""
    out = Path(args.output_dir)
    pictures = draw_pictures(metrics, scores, clinical)
    for name, svg in pictures.items():
        with atomic_path(out / "pictures" / f"{name}.svg") as partial:
            partial.write_bytes(svg)
    with atomic_path(out / "mistakes.json") as partial:
        partial.write_text(_json([mistake.as_dict() for mistake in clinical.mistakes]), encoding="utf-8")
    with atomic_path(out / "cases.csv") as partial:
        write_cases(partial, pairs, scores, clinical)
    write_page(out / "report.html", args, pairs, metrics, scores, clinical, pictures)
    with atomic_path(out / "metrics.json") as partial:
        partial.write_text(_json(metrics), encoding="utf-8")


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def write_cases(path: Path, pairs: PairedReports, scores: PairScores, clinical: Clinical) -> None:
    """One line a case: its metrics, which fields agree (1, 0, empty where not stated), its kinds of serious mistake."""
    hits = clinical.hits()
    kinds: dict[str, list[str]] = {}
    for mistake in clinical.mistakes:
        kinds.setdefault(mistake.id, []).append(mistake.kind)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", *scores.means, *(f"field_{name}" for name in hits), "serious_mistakes"])
        for place, key in enumerate(pairs.ids):
            figures = [f"{values[place]:.6g}" for values in scores.means.values()]
            fields = ["" if np.isnan(values[place]) else int(values[place]) for values in hits.values()]
            writer.writerow([key, *figures, *fields, "; ".join(dict.fromkeys(kinds.get(key, [])))])


def draw_pictures(metrics: dict[str, Any], scores: PairScores, clinical: Clinical) -> dict[str, bytes]:
    """SVG of every picture that the data allows, by name."""
    figures: dict[str, Any] = {}
    if metrics["mistakes"]["by_kind"]:
        figures["mistakes"] = mistakes_figure(metrics["mistakes"]["by_kind"], metrics["n"])
    for name in CONFUSIONS:
        table = confusion(name, clinical.predicted, clinical.expected)
        if table and len(table[1]) > 1:
            figures[f"confusion_{name}"] = confusion_figure(field_label(name), *table)
    figures["distributions"] = distribution_figure({name: scores.means[name] for name in DISTRIBUTIONS})
    if "calibration" in metrics:
        figures["calibration"] = calibration_figure(metrics["calibration"])
    survival = metrics.get("survival")
    if survival and survival["groups"]:
        ids = [key for key in clinical.follow_up if key in clinical.risks]
        times = np.array([clinical.follow_up[key].time for key in ids])
        events = np.array([clinical.follow_up[key].event for key in ids], dtype=bool)
        groups = groups_of([clinical.risks[key] for key in ids])
        p, index = survival["log_rank_p"], survival["concordance_index"]
        caption = "" if index is None else f"concordance index {index:.3f}"
        caption += "" if p is None else f", log-rank p = {p:.2g}"
        figures["survival"] = survival_figure(times, events, groups, caption)
    return {name: picture(figure) for name, figure in figures.items()}
