"""The model card of a result folder, from what its settings, its run and its scores say and nothing else."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from encoders import SLIDE_ENCODER_MARK
from vlm_settings import VLMSettings

PLACE = "ORG/NAME"  # stands for the repository until it is known
RECORD_SUFFIXES = (".json", ".jsonl", ".csv", ".h5")
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


def model_card(
    settings: VLMSettings,
    run_json: dict[str, Any],
    metrics: dict[str, Any],
    *,
    licence: str | None,
    repo_id: str | None = None,
    parts: Sequence[str] = (),
) -> str:
    """The card in the hub's form: YAML on top, then Markdown. Paths of the training machine are left out.

    Args:
        settings: of the model.
        run_json: of its training run; empty where that is unknown.
        metrics: of evaluation/score.py; empty where there are none.
        licence: of the weights, by the hub's name.
        repo_id: where the model goes; :data:`PLACE` stands for it where that is unknown.
        parts: folders that the model's holds, such as ``language_model``.
    """
    base, encoder = public_name(settings.llm_name), public_encoder(settings.encoder)
    head: dict[str, Any] = {"library_name": "slidescribe", "pipeline_tag": "image-to-text"}
    head["tags"] = ["pathology", "report-generation"] if settings.input_kind == "features" else ["report-generation"]
    if "/" in base and not base.startswith("a local"):
        head["base_model"] = base
        head["base_model_relation"] = "adapter" if "adapter" in parts else "finetune"
    if licence:
        head["license"] = licence
    sections = [
        f"# {repo_id.rpartition('/')[2] if repo_id else 'A SlideScribe model'}",
        f"Writes {KINDS[settings.input_kind]}: an image encoder, a projector and a language model, trained with "
        "SlideScribe.",
        "## Intended use\n\nResearch. A report is a draft by a model, may be wrong in any of its words, and must not "
        "be used for the care of patients. This is not a medical device.",
        "## How to run it\n\n" + _how_to_run(settings, repo_id or PLACE, parts),
        "## Model\n\n" + _table(_model_rows(settings, base)),
        "## Training\n\n" + _table(_training_rows(settings, run_json)),
        "## Metrics\n\n" + _metrics(metrics),
        "## Limits\n\n" + "\n".join(f"- {line}" for line in _limits(settings, run_json, metrics)),
        "## Licence\n\n" + _licence(base, encoder, licence),
    ]
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n" + "\n\n".join(sections) + "\n"


def public_name(name: str) -> str:
    """A hub name as it is; of a path only its last part, since folders may name people and places."""
    is_path = name.startswith(("/", ".", "~")) or Path(name).is_absolute() or name.count("/") > 1 or "\\" in name
    return f"a local folder ({Path(name).name})" if is_path else name


def public_encoder(name: str | None) -> str:
    """The same of an encoder, or of a tile and a slide encoder."""
    return SLIDE_ENCODER_MARK.join(public_name(part) for part in (name or "unknown").split(SLIDE_ENCODER_MARK))


def without_folders(values: Any) -> Any:
    """JSON values in which every path is only its last part; names on the hub and other texts stay."""
    if isinstance(values, dict):
        return {name: without_folders(value) for name, value in values.items()}
    if isinstance(values, list):
        return [without_folders(value) for value in values]
    if not isinstance(values, str):
        return values
    if SLIDE_ENCODER_MARK in values:
        return SLIDE_ENCODER_MARK.join(without_folders(part) for part in values.split(SLIDE_ENCODER_MARK))
    return (Path(values).name or values) if _is_path(values) else values


def _is_path(text: str) -> bool:
    if "\n" not in text and (Path(text).is_absolute() or text.startswith(("./", "../", "~/"))):
        return True
    if "/" not in text or "://" in text or any(letter.isspace() or letter in "<>{}" for letter in text):
        return False  # a word, an address, a sentence, a template
    return text.count("/") > 1 or text.endswith(RECORD_SUFFIXES)


def _how_to_run(settings: VLMSettings, repo_id: str, parts: Sequence[str]) -> str:
    """The command, and what a reader needs for it that is not on the hub."""
    flags, missing = "", []
    if "language_model" not in parts and public_name(settings.llm_name) != settings.llm_name:
        flags += " --llm_name LANGUAGE_MODEL"
        missing.append(f"language model ({Path(settings.llm_name).name})")
    if "encoder" not in parts and public_encoder(settings.encoder) != (settings.encoder or "unknown"):
        flags += " --vision_model_name ENCODER"
        names = [Path(part).name for part in str(settings.encoder).split(SLIDE_ENCODER_MARK)]
        missing.append(f"image encoder ({SLIDE_ENCODER_MARK.join(names)})")
    given = "--slide X.svs" if settings.input_kind == "features" else "--image X.png"
    told = f"```\npython inference/generate.py --model {repo_id} {given}{flags}\n```"
    if missing:
        told += (
            f"\n\nIts {' and its '.join(missing)} lay in folders of the training machine and are not part of this "
            "repository; name folders that hold them. Others than those it was trained with are refused."
        )
    return told


def _model_rows(settings: VLMSettings, base: str) -> dict[str, Any]:
    tiling = ", ".join(f"{name} {value}" for name, value in settings.tiling.items())
    return {
        "language model": base + (f", revision {settings.llm_revision}" if settings.llm_revision else ""),
        "image encoder": public_encoder(settings.encoder),
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
    adapts = settings.training.get("llm_training") in ("lora", "qlora")
    flags = ("lora_rank", "learning_rate", "num_epochs", "batch_size", "mixed_precision", "seed")
    flags = ("llm_training", *flags[0 if adapts else 1 :])
    rows |= {name: settings.training[name] for name in flags if settings.training.get(name) is not None}
    if settings.training.get("train_json"):
        rows["training records"] = Path(str(settings.training["train_json"])).name
    if run_json.get("lowest_val_loss") is not None:
        rows["lowest validation loss"] = f"{run_json['lowest_val_loss']:.4f}"
    if run_json.get("image_ablation"):
        rows["validation loss with another case's image"] = (
            f"{run_json['image_ablation']['shuffled_over_right']:.2f} times that with its own"
        )
    if run_json.get("git_revision"):
        rows["SlideScribe revision"] = run_json["git_revision"]
    return rows or {"known": "nothing; no run.json was given"}


def _metrics(metrics: dict[str, Any]) -> str:
    if not metrics:
        return "None were given. A model without scores on held-out patients should not be trusted with anything."
    rows = {"model": metrics} | {f"baseline: {k}": v for k, v in (metrics.get("baselines") or {}).items()}
    shown = [name for name in SHOWN_METRICS if name in metrics]
    lines = ["| | " + " | ".join(shown) + " |", "|---" * (len(shown) + 1) + "|"]
    for label, row in rows.items():
        lines.append(f"| {label} | " + " | ".join(_value(row, name) for name in shown) + " |")
    patients = f" of {metrics['num_patients']} patients" if "num_patients" in metrics else ""
    facts = [f"{metrics.get('n', 'An unknown number of')} references{patients}."]
    if "references_seen_in_training" in metrics:
        facts.append(f"{metrics['references_seen_in_training']} of them occur word for word in the training reports.")
    if "predictions_verbatim_from_training" in metrics:
        facts.append(f"{metrics['predictions_verbatim_from_training']:.0%} of the model's reports do.")
    has_intervals = any("[" in line for line in lines)
    facts.append("Brackets hold 95 % intervals." if has_intervals else "No intervals were computed.")
    return "\n".join(lines) + "\n\n" + " ".join(facts) + _mistakes(metrics) + _fields(metrics)


def _value(row: dict[str, Any], name: str) -> str:
    """A metric with its interval, where score.py computed one."""
    value = row.get(name)
    if not isinstance(value, int | float):
        return ""
    pair = (row.get("intervals_95") or {}).get(name)
    return f"{value:.3f}" + (f" [{pair[0]:.3f}, {pair[1]:.3f}]" if pair else "")


def _mistakes(metrics: dict[str, Any]) -> str:
    mistakes = metrics.get("mistakes")
    if not mistakes:
        return ""
    kinds = ", ".join(f"{name} {count}" for name, count in mistakes["by_kind"].items())
    found = f"{mistakes['cases_affected']} reports ({mistakes['share_affected']:.1%}) hold a clinically serious mistake"
    return f"\n\n{found}{f': {kinds}' if kinds else ''}. Only what the reports' fields show is counted."


def _fields(metrics: dict[str, Any]) -> str:
    """How often each field of a report is right, for fields that some references have."""
    fields = {name: found for name, found in (metrics.get("fields") or {}).items() if found.get("n")}
    if not fields:
        return ""
    lines = ["| field | references | right |", "|---|---|---|"]
    for name, found in fields.items():
        low_high = found.get("accuracy_95")
        spread = f" [{low_high[0]:.3f}, {low_high[1]:.3f}]" if low_high else ""
        lines.append(f"| {name.replace('_', ' ')} | {found['n']} | {found['accuracy']:.3f}{spread} |")
    return "\n\n" + "\n".join(lines)


def _limits(settings: VLMSettings, run_json: dict[str, Any], metrics: dict[str, Any]) -> list[str]:
    ablation = run_json.get("image_ablation")
    lines = [] if not ablation or ablation["uses_image"] else ["**It does not use the image**: see its training."]
    lines += [
        "It knows only what its training reports say; other organs, stains, scanners and hospitals were not tried "
        "unless the scores above are of them.",
        "It always writes a report, also of slides that show nothing that it learned.",
        "Overlap scores such as BLEU count words and not medical truth.",
    ]
    if metrics and not metrics.get("baselines"):
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
