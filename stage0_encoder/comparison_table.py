"""The table and the figure of a comparison of encoders."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slide_features import atomic_path
from stage0_encoder.comparison_steps import ENCODE, PREDICT, STAGE1, STAGE2, TRAIN, Step, encoder_of, read_journal

METRICS = ("bleu_4", "rouge_l", "meteor", "cider_d", "exact_match")
COMPARED, FAILED = "compared", "failed"
SECONDS = (TRAIN, ENCODE, STAGE1, STAGE2, PREDICT)


def row_of(
    name: str, folder: Path, steps: Sequence[Step], metrics: Sequence[str], failure: str
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """One encoder's row, and its metrics.json; None where there is none.

    Raises:
        ValueError: a metric is unknown to score.py.
    """
    encoder, journal = encoder_of(steps), read_journal(folder)
    seconds = {f"{step}_seconds": journal.get(step, {}).get("seconds") for step in SECONDS}
    row: dict[str, Any] = {"name": name, "encoder": encoder, "status": FAILED if failure else COMPARED}
    found = None if failure else json.loads((folder / "scores" / "metrics.json").read_text())
    for metric in metrics:
        if found is not None and metric not in found:
            numbers = [key for key, value in found.items() if isinstance(value, int | float)]
            raise ValueError(f"--metrics {metric}: score.py gives {', '.join(numbers)}")
        row[metric] = None if found is None else found[metric]
        row[f"{metric}_interval_95"] = None if found is None else found["intervals_95"].get(metric)
    row |= {
        "reports": None if found is None else found["n"],
        "encoder_parameters": None if failure else count_parameters(encoder, folder),
        "learned_parameters_stage1": _learned(folder / "stage1"),
        "learned_parameters_stage2": _learned(folder / "stage2"),
        **seconds,
        "seconds": round(sum(value for value in seconds.values() if value), 1),
        "failure": failure,
    }
    return row, found


def count_parameters(encoder: str, folder: Path) -> int | None:
    """Parameters of an encoder, without reading its weights; None where its description cannot be had."""
    from encoders import load_encoder

    kept = folder / "encoder_parameters.json"
    known = json.loads(kept.read_text()) if kept.is_file() else {}
    if encoder not in known:
        try:
            known = {encoder: sum(p.numel() for p in load_encoder(encoder, pretrained=False).parameters())}
        except (ValueError, OSError):
            return None
        with atomic_path(kept) as partial:
            partial.write_text(json.dumps(known))
    return known[encoder]


def _learned(run_dir: Path) -> int | None:
    """Parameters that learned in a run, from its run.json."""
    path = run_dir / "run.json"
    if not path.is_file():
        return None
    counts = json.loads(path.read_text())["trainable_parameters"].values()
    return sum(int(count.split(" / ")[0].replace(",", "")) for count in counts)


def write_tables(rows: list[dict[str, Any]], metrics: Sequence[str], output: Path) -> None:
    """Write comparison.json, comparison.csv (intervals as two columns) and comparison.md, best first in the last."""
    with atomic_path(output / "comparison.json") as partial:
        partial.write_text(json.dumps(rows, indent=1) + "\n")
    flat = [_with_interval_columns(row) for row in rows]
    with atomic_path(output / "comparison.csv") as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(flat[0]))
        writer.writeheader()
        writer.writerows(flat)
    heads = ["encoder", *(metric.replace("_", " ") for metric in metrics), "parameters (M)", "minutes", "reports"]
    lines = [heads, ["---"] * len(heads)]
    ranked = sorted(rows, key=lambda row: (row["status"] == FAILED, -(row[metrics[0]] or 0)))
    for row in ranked:
        if row["status"] == FAILED:
            lines.append([row["name"], *["failed"] * len(metrics), "", f"{row['seconds'] / 60:.1f}", ""])
            continue
        scores = [_with_interval(row[metric], row[f"{metric}_interval_95"]) for metric in metrics]
        millions = "" if row["encoder_parameters"] is None else f"{row['encoder_parameters'] / 1e6:.2f}"
        lines.append([row["name"], *scores, millions, f"{row['seconds'] / 60:.1f}", str(row["reports"])])
    notes = [f"\n{row['name']} failed: {row['failure']}\n" for row in rows if row["status"] == FAILED]
    with atomic_path(output / "comparison.md") as partial:
        text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
        partial.write_text(text + "\nIn brackets: 95 % bootstrap interval over patients.\n" + "".join(notes))


def draw(results: dict[str, dict[str, Any]], rows: list[dict[str, Any]], metrics: Sequence[str], picture: Path) -> None:
    """Draw each metric with its interval and best baseline, best on top, and beside them time and parameters."""
    from evaluation.figures import comparison_figure

    beside = {row["name"]: row for row in rows}
    ranked = dict(sorted(results.items(), key=lambda item: -item[1][metrics[0]]))
    parameters = {name: beside[name]["encoder_parameters"] for name in ranked}
    costs = {
        "minutes": {name: beside[name]["seconds"] / 60 for name in ranked},
        "parameters (M)": {name: None if count is None else count / 1e6 for name, count in parameters.items()},
    }
    figure = comparison_figure(ranked, metrics, costs)
    with atomic_path(picture) as partial:
        figure.savefig(partial, dpi=140, format="png")


def _with_interval(value: float, interval: list[float] | None) -> str:
    return f"{value:.4f}" + ("" if interval is None else f" [{interval[0]:.4f}, {interval[1]:.4f}]")


def _with_interval_columns(row: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if name.endswith("_interval_95"):
            low, high = value or (None, None)
            metric = name.removesuffix("_interval_95")
            flat |= {f"{metric}_low_95": low, f"{metric}_high_95": high}
        else:
            flat[name] = value
    return flat
