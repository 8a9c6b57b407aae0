"""What train_contrastive.py prepares from its flags: records, batches, optimizer; and what its best model is."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from accelerator_setup import parameter_groups, trainable_parameters
from command_line import chosen
from run_checkpoints import run_identity
from run_log import read_log
from slide_reports import RECORD_FLAGS, Record, RecordBatches, digests, read_training_records
from stage0_encoder.alignment_model import AlignmentModel
from stage0_encoder.contrastive_flags import MAY_DIFFER
from stage0_encoder.pairs import Items, PairDataset, make_pair_loader
from stage0_encoder.retrieval import RANKS, read_zero_shot


def read_pairs(args) -> tuple[Sequence[Record], Sequence[Record], list[str]]:
    """Training and validation records, and a line for each left out.

    Raises:
        FileNotFoundError, ValueError: see `read_training_records`; or there is nothing to stop early by.
    """
    train, val, problems = read_training_records(**chosen(args, RECORD_FLAGS))
    if args.early_stopping_patience and not len(val):
        raise ValueError("--early_stopping_patience needs validation records; give --val_json or --val_fraction")
    return train, val, problems


def read_classes(args):
    """Classes and labels of ``--class_prompts``, if any."""
    if bool(args.class_prompts) != bool(args.class_labels):
        raise ValueError("--class_prompts and --class_labels go together: the classes, and which records are of which")
    if args.best_metric.startswith("zero_shot") and not args.class_prompts:
        raise ValueError(f"--best_metric {args.best_metric} needs --class_prompts and --class_labels")
    return read_zero_shot(args.class_prompts, args.class_labels) if args.class_prompts else None


def make_batches(args, model, records, num_processes: int, *, shuffle: bool):
    """Batches of the items of records and their loader, for training where ``shuffle``."""
    dataset = PairDataset(
        records,
        Items.of(records),
        model.text.tokens(args.max_text_tokens),
        args.num_patches,
        image_transform=model.image.transform if args.image_root else None,
        seed=args.seed if shuffle else None,
        expected=model.settings.features_made,
    )
    batches = RecordBatches(len(dataset), args.batch_size, num_processes=num_processes, shuffle=shuffle, seed=args.seed)
    return batches, make_pair_loader(dataset, batches, args.num_workers)


def score_to_go_by(scores: dict[str, float], best_metric: str) -> float:
    """The score that decides which model is the best; higher is better.

    Raises:
        ValueError: no validation record has a label.
    """
    if f"val_{best_metric}" not in scores:
        raise ValueError(f"--best_metric {best_metric}: no validation record is in --class_labels")
    return -scores["val_loss"] if best_metric == "loss" else scores[f"val_{best_metric}"]


def best_line(run_dir: Path, best_metric: str) -> str:
    """What the best model reached, for the terminal; empty if there was no validation."""
    lines = [line for line in read_log(run_dir / "log.jsonl") if "val_loss" in line]
    if not lines:
        return ""
    best = max(lines, key=lambda line: score_to_go_by(line, best_metric))
    recalls = [
        f"{way.replace('_', ' ')} " + " / ".join(f"{best[f'val_{way}_recall_at_{k}']:.3f}" for k in RANKS)
        for way in ("image_to_text", "text_to_image")
    ]
    candidates = f"{best['val_num_texts']} texts and {best['val_num_images']} images or slides"
    return (
        f"best_model is of epoch {best['epoch']:g}, by {best_metric}; recall at {' / '.join(map(str, RANKS))} among "
        f"{candidates}: {', '.join(recalls)}"
    )


def make_optimizer(args, model: AlignmentModel) -> torch.optim.Optimizer:
    """AdamW with a rate of its own for the text encoder and for both projections."""
    rates = {"text": args.text_learning_rate}
    rates |= dict.fromkeys(("image_projection", "text_projection"), args.projection_learning_rate)
    return torch.optim.AdamW(parameter_groups(model, args.weight_decay, rates), lr=args.learning_rate)


def identity_of(
    flags: dict[str, Any],
    batches: RecordBatches,
    train: Sequence[Record],
    val: Sequence[Record],
    model: AlignmentModel,
) -> dict[str, Any]:
    """What must be the same for a run to be resumed."""
    return run_identity(
        {name: value for name, value in flags.items() if name not in MAY_DIFFER},
        batches,
        digests(train, val),
        {"text": model.settings.text_fingerprint, "image": model.settings.image_fingerprint},
    )


def facts_of(
    model: AlignmentModel, train: Sequence[Record], val: Sequence[Record], batches: RecordBatches, num_steps: int
) -> dict[str, Any]:
    """What run.json says of a run."""
    return {
        "train_records": len(train),
        "train_items": batches.num_records,
        "val_records": len(val),
        "optimizer_steps": num_steps,
        "trainable_parameters": trainable_parameters(model),
    }
