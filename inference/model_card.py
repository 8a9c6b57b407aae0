"""The model card of a result folder, from what its settings, its run and its scores say and nothing else."""

import json
from pathlib import Path
from typing import Any

import yaml

from slide_vlm import VLMSettings

KINDS = {"features": "pathology reports of whole-slide images", "images": "reports of images"}
SHOWN_METRICS = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "meteor", "exact_match")


def read_json(path: str | Path | None, flag: str) -> dict[str, Any]:
    """An object of a JSON file; empty without a file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds no JSON object.
    """
    if path is None:
        return {}
    if not Path(path).is_file():
        raise FileNotFoundError(f"{flag} {path}: no such file")
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{flag} {path}: not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{flag} {path}: holds no JSON object; give the file that the run or score.py wrote")
    return values


def model_card(settings: VLMSettings, run_json: dict[str, Any], metrics: dict[str, Any], *, licence: str | None) -> str:
    """The card in the hub's form: YAML on top, then Markdown. Paths of the training machine are left out."""
    base = public_name(settings.llm_name)
    head: dict[str, Any] = {"library_name": "slidescribe", "pipeline_tag": "image-to-text"}
    head["tags"] = ["pathology", "report-generation"] if settings.input_kind == "features" else ["report-generation"]
    if "/" in base and not base.startswith("a local"):
        head["base_model"] = base
    if licence:
        head["license"] = licence
    sections = [
        "# A SlideScribe model",
        f"Writes {KINDS[settings.input_kind]}: an image encoder, a projector and a language model, trained with "
        "SlideScribe.",
        "## Intended use\n\nResearch. A report is a draft by a model, may be wrong in any of its words, and must not "
        "be used for the care of patients. This is not a medical device.",
        "## Model\n\n" + _table(_model_rows(settings, base)),
        "## Training\n\n" + _table(_training_rows(settings, run_json)),
        "## Metrics\n\n" + _metrics(metrics),
        "## Limits\n\n" + "\n".join(f"- {line}" for line in _limits(settings, metrics)),
        "## Licence\n\n" + _licence(base, public_name(settings.encoder or "unknown"), licence),
        "## How to run it\n\n```\npython inference/generate.py --model ORG/NAME --slide X.svs\n```",
    ]
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n" + "\n\n".join(sections) + "\n"


def public_name(name: str) -> str:
    """A hub name as it is; of a path only its last part, since folders may name people and places."""
    is_path = name.startswith(("/", ".", "~")) or Path(name).is_absolute() or name.count("/") > 1 or "\\" in name
    return f"a local folder ({Path(name).name})" if is_path else name


def without_folders(values: Any) -> Any:
    """JSON values in which every absolute path is only its last part."""
    if isinstance(values, dict):
        return {name: without_folders(value) for name, value in values.items()}
    if isinstance(values, list):
        return [without_folders(value) for value in values]
    is_path = isinstance(values, str) and "\n" not in values and Path(values).is_absolute()
    return (Path(values).name or values) if is_path else values


def _model_rows(settings: VLMSettings, base: str) -> dict[str, Any]:
    tiling = ", ".join(f"{name} {value}" for name, value in settings.tiling.items())
    return {
        "language model": base + (f", revision {settings.llm_revision}" if settings.llm_revision else ""),
        "image encoder": public_name(settings.encoder or "unknown"),
        "tiles": tiling or "unknown",
        "projector": settings.projector,
        "token reducer": settings.token_reducer,
        "visual tokens": settings.num_visual_tokens,
        "question": settings.question,
    }


def _training_rows(settings: VLMSettings, run_json: dict[str, Any]) -> dict[str, Any]:
    counts = ("train_records", "val_records", "left_out_records", "optimizer_steps")
    rows = {name.replace("_", " "): run_json[name] for name in counts if name in run_json}
    parts = run_json.get("trainable_parameters")
    if isinstance(parts, dict):  # "learned / all" of each part
        parts = ", ".join(f"{name} {count}" for name, count in parts.items() if not str(count).startswith("0 /"))
    if parts:
        rows["trainable parameters"] = parts
    flags = ("llm_training", "lora_rank", "learning_rate", "num_epochs", "batch_size", "mixed_precision", "seed")
    rows |= {name: settings.training[name] for name in flags if settings.training.get(name) is not None}
    if settings.training.get("train_json"):
        rows["training records"] = Path(str(settings.training["train_json"])).name
    return rows or {"known": "nothing; no run.json was given"}


def _metrics(metrics: dict[str, Any]) -> str:
    if not metrics:
        return "None were given. A model without scores on held-out patients should not be trusted with anything."
    rows = {"model": metrics} | {f"baseline: {k}": v for k, v in (metrics.get("baselines") or {}).items()}
    shown = [name for name in SHOWN_METRICS if name in metrics]
    lines = ["| | " + " | ".join(shown) + " |", "|---" * (len(shown) + 1) + "|"]
    for label, row in rows.items():
        lines.append(f"| {label} | " + " | ".join(_value(row, name) for name in shown) + " |")
    facts = [f"{metrics['n']} references." if "n" in metrics else ""]
    if "references_seen_in_training" in metrics:
        facts.append(f"{metrics['references_seen_in_training']} of them occur word for word in the training reports.")
    facts.append("Brackets hold intervals." if any("[" in line for line in lines) else "No intervals were computed.")
    return "\n".join(lines) + "\n\n" + " ".join(filter(None, facts))


def _value(row: dict[str, Any], name: str) -> str:
    """A metric with its interval, where ``intervals`` has a pair under its name."""
    value = row.get(name)
    if not isinstance(value, int | float):
        return ""
    pair = (row.get("intervals") or {}).get(name)
    if isinstance(pair, list | tuple) and len(pair) == 2:
        return f"{value:.3f} [{pair[0]:.3f}, {pair[1]:.3f}]"
    return f"{value:.3f}"


def _limits(settings: VLMSettings, metrics: dict[str, Any]) -> list[str]:
    lines = [
        "It knows only what its training reports say; other organs, stains, scanners and hospitals were not tried "
        "unless the scores above are of them.",
        "It always writes a report, also of slides that show nothing that it learned.",
        "Overlap scores such as BLEU count words and not medical truth.",
    ]
    if not metrics.get("baselines"):
        lines.append("The scores are not compared with those of a constant report.")
    uncertain = settings.decoding.get("uncertain")
    if uncertain:
        lines.append(
            f"Answers with {uncertain['measure']} below {uncertain['threshold']:.3f} are marked uncertain; on "
            f"{uncertain['records']} validation records {uncertain['coverage']:.0%} were not, with an error rate of at "
            f"most {uncertain['error_bound']:.3f} (delta {uncertain['delta']:g})."
        )
    return lines


def _licence(base: str, encoder: str, licence: str | None) -> str:
    own = f"These weights: {licence}." if licence else "No licence was stated for these weights."
    return (
        f"{own} The terms of the language model ({base}), of the image encoder ({encoder}) and of the training data "
        "hold besides."
    )


def _table(rows: dict[str, Any]) -> str:
    cells = {name: " ".join(str(value).split()).replace("|", "\\|") for name, value in rows.items()}
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in cells.items())
