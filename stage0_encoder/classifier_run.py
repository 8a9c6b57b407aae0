"""What train_classifier.py prepares from its flags: records, classifier, loaders, schedule; and its evaluation."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from timm.data import Mixup, create_transform
from timm.scheduler import create_scheduler_v2
from torch.utils.data import DataLoader

from accelerator_setup import parameter_groups, trainable_parameters
from command_line import chosen
from encoder_lora import add_encoder_lora
from encoders import load_encoder
from image_encoder import ImageEncoder
from report_loss import StepResult
from run_checkpoints import run_identity
from slide_encoders import GatedAttention
from slide_features import count_tiles, read_slide_features
from slide_reports import RecordBatches, inputs_digest, with_inputs
from stage0_encoder.classification_scores import for_log, save_scores, score_all, table
from stage0_encoder.classifier import OWN_NETWORKS, Classifier, balanced_weights, own_cnn, own_vit
from stage0_encoder.classifier_data import Examples, make_loader, sources_of
from stage0_encoder.classifier_flags import PLACES, READING_FLAGS
from stage0_encoder.encoder_run import freeze_unused_of_encoder, save_result, share_statistics
from stage0_encoder.labels import UNLABELLED, LabelledRecords, labels_digest, read_labelled
from stage0_encoder.tile_files import write_all_tiles

OF_TEXT = ("num_supervised_tokens", "padding_fraction")


def read_cases(args) -> tuple[LabelledRecords, LabelledRecords, dict[str, list[str]]]:
    """Training and validation records with their classes, and the classes of each label.

    Raises:
        FileNotFoundError, ValueError: see `read_labelled`; or there is nothing to stop early by.
    """
    inputs = args.coords_dir or args.features_dir
    found = read_labelled(
        args.train_json, args.val_json, args.labels, features_dir=inputs, **chosen(args, READING_FLAGS)
    )
    if args.early_stopping_patience and not len(found[1].records):
        raise ValueError("--early_stopping_patience needs validation records; give --val_json or --val_fraction")
    return found


def usable(args, accelerator, *sets: LabelledRecords):
    """Both sets without the records whose inputs are missing, the tile files, and a line for each left out."""
    tile_files, problems, kept = {}, [], []
    if args.input in ("tiles", "montage"):
        folder = Path(args.tiles_dir or Path(args.output_dir) / "tiles")
        paths = [path for cases in sets for record in cases.records for path in record.inputs]
        writing = {"max_tiles": args.max_tiles, "num_workers": args.num_workers}
        with accelerator.main_process_first():
            show = accelerator.is_main_process
            tile_files, faults = write_all_tiles(paths, args.slides, folder, show=show, **writing)
    for cases in sets:
        if args.input in ("tiles", "montage"):
            bad = {n: faults[p] for n, r in enumerate(cases.records) for p in r.inputs if p in faults}
            problems += [f"{cases.records[number].id}: {fault}" for number, fault in bad.items()]
            places = [number for number in range(len(cases.records)) if number not in bad]
        else:
            good, lines = with_inputs(cases.records)
            problems += lines
            names = {record.id for record in good}
            places = [number for number, record in enumerate(cases.records) if record.id in names]
        kept.append(LabelledRecords([cases.records[place] for place in places], cases.labels[places]))
    if not len(kept[0].records):
        raise ValueError(f"{args.train_json}: no record to train on ({problems[0]})")
    return *kept, tile_files, problems


def build_encoder(args, train: LabelledRecords):
    """The image encoder, or gated attention for bags, before anything of it learned.

    Raises:
        ValueError, FileNotFoundError, PermissionError, ConnectionError: it cannot be had, or no bag is there.
    """
    if args.input == "bags":
        paths = (path for record in train.records for path in record.inputs)
        first = next((path for path in paths if path.exists() and count_tiles(path)), None)
        if first is None:
            raise ValueError(f"{args.train_json}: no record has features in --features_dir {args.features_dir}")
        width = read_slide_features(first).features.shape[1]
        return GatedAttention(width, args.bag_width, attention_width=args.bag_attention_width, dropout=args.bag_dropout)
    if args.encoder == "vit":
        sizes = {"width": args.vit_width, "depth": args.vit_depth, "num_heads": args.vit_heads}
        return own_vit(image_size=args.image_size, patch_size=args.vit_patch_size, **sizes)
    if args.encoder == "cnn":
        return own_cnn(image_size=args.image_size, width=args.cnn_width, depths=args.cnn_depths)
    return load_encoder(args.encoder, pretrained=not args.random_weights)


def build_classifier(args, encoder, train: LabelledRecords, class_names: dict[str, list[str]]) -> Classifier:
    """The encoder with a new head and the losses that the flags ask for."""
    return Classifier(
        encoder,
        class_names,
        dropout=args.dropout,
        label_smoothing=args.label_smoothing,
        class_weights=weights_of_classes(args, train, class_names),
        mixup=Mixup(args.mixup, args.cutmix, label_smoothing=0.0) if args.mixup or args.cutmix else None,
    )


def choose_what_learns(args, encoder) -> None:
    """Freeze the encoder, put adapters on it, or let all of it learn that its vector depends on."""
    learns_whole = args.input == "bags" or args.encoder in OWN_NETWORKS or args.encoder_training == "full"
    encoder.requires_grad_(learns_whole)
    if not learns_whole and args.encoder_training == "lora":
        add_encoder_lora(encoder, rank=args.lora_rank, alpha=args.lora_alpha, dropout=args.lora_dropout)
    freeze_unused_of_encoder(encoder)


def weights_of_classes(args, train: LabelledRecords, class_names: dict[str, list[str]]):
    if args.class_weighting == "none":
        return None
    labels = torch.from_numpy(train.labels)
    return [balanced_weights(labels[:, number], len(names)) for number, names in enumerate(class_names.values())]


def training_transform(args, encoder):
    """timm's augmentation with the encoder's size and normalization; None for bags."""
    if not isinstance(encoder, ImageEncoder):
        return None
    return create_transform(
        (3, encoder.image_size, encoder.image_size),
        is_training=True,
        scale=(args.crop_scale, 1.0),
        hflip=args.hflip,
        vflip=args.vflip,
        color_jitter=args.color_jitter,
        auto_augment=args.auto_augment,
        re_prob=args.random_erasing,
        re_mode="pixel",
        interpolation="bicubic",
        mean=encoder.mean,
        std=encoder.std,
    )


def make_loaders(
    args, encoder, train: LabelledRecords, val: LabelledRecords, tile_files: dict[Path, Path], num_processes: int
) -> tuple[RecordBatches, DataLoader, DataLoader]:
    """Batches of the training examples, their loader, and that of the validation examples."""
    augmenting = {"transform": training_transform(args, encoder), "seed": args.seed}
    plain = {"transform": encoder.transform if isinstance(encoder, ImageEncoder) else None, "seed": None}
    by = {"montage_side": args.montage_side, "max_tiles": args.max_tiles}
    train_data, val_data = (
        Examples(args.input, sources_of(cases, args.input, tile_files), cases.labels, **way, **by)
        for cases, way in ((train, augmenting), (val, plain))
    )
    train_batches = RecordBatches(
        len(train_data),
        args.batch_size,
        num_processes=num_processes,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        shuffle=True,
        seed=args.seed,
    )
    val_batches = RecordBatches(len(val_data), args.batch_size, num_processes=num_processes)
    loaders = [make_loader(*of, args.num_workers) for of in ((train_data, train_batches), (val_data, val_batches))]
    return train_batches, *loaders


def make_optimizer(args, classifier: Classifier) -> torch.optim.Optimizer:
    """AdamW with a rate of its own for the encoder."""
    groups = parameter_groups(classifier, args.weight_decay, {"encoder": args.encoder_learning_rate})
    return torch.optim.AdamW(groups, lr=args.learning_rate)


def make_timm_scheduler(args, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> Any:
    """timm's schedule over optimizer steps, which here stand for its epochs."""
    num_steps = args.num_epochs * steps_per_epoch
    scheduler, _ = create_scheduler_v2(
        optimizer,
        args.lr_scheduler_type,
        num_epochs=max(1, num_steps),
        warmup_epochs=round(args.warmup_ratio * num_steps),
        warmup_lr=0.0,
        decay_epochs=max(1, args.decay_epochs * steps_per_epoch),
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    return scheduler


def identity_of(
    flags: dict[str, Any], batches: RecordBatches, train: LabelledRecords, val: LabelledRecords, weights: str
) -> dict[str, Any]:
    """What must be the same for a run to be resumed; ``weights`` is the fingerprint of the encoder that it began as."""
    return run_identity(
        {name: value for name, value in flags.items() if name not in PLACES},
        batches,
        {"records": labels_digest(train), "val_records": labels_digest(val)},
        {"inputs": inputs_digest(train.records), "encoder_weights": weights},
    )


def facts_of(
    classifier: Classifier, train: LabelledRecords, val: LabelledRecords, batches: RecordBatches, num_steps: int
) -> dict[str, Any]:
    """What run.json says of a run."""
    return {
        "train_records": len(train.records),
        "val_records": len(val.records),
        "train_examples": batches.num_records,
        "optimizer_steps": num_steps,
        "classes": {name: len(names) for name, names in classifier.class_names.items()},
        "trainable_parameters": trainable_parameters(classifier),
    }


def without_text(result: StepResult) -> dict[str, Any]:
    """What a step gave, for the log, without what is only of a language model."""
    return {name: value for name, value in asdict(result).items() if name not in OF_TEXT}


def best_scores(run_dir: Path) -> str:
    """The best model's scores for the terminal; empty if there was no validation."""
    scores = run_dir / "scores.json"
    return table(json.loads(scores.read_text())) if scores.is_file() else ""


@torch.no_grad()
def evaluate(accelerator, classifier: Classifier, loader, val: LabelledRecords, args, state) -> dict[str, float]:
    """Scores for the log; a best model is saved with its scores. Collective: call on every rank.

    The loss is the mean over labels of examples; classes are chosen by the mean probability of a record's examples.
    """
    classifier.eval()
    share_statistics(accelerator, classifier)
    found = []
    for batch in loader:
        with accelerator.autocast():
            losses = classifier(batch)
            probabilities = torch.cat([part.float().softmax(dim=1) for part in classifier.logits(batch)], dim=1)
        num_labels = (batch["labels"] != UNLABELLED).sum()
        rows = zip(batch["record"].tolist(), batch["counts"].tolist(), probabilities.cpu(), strict=True)
        found.append((float(losses.sum()), int(num_labels), [(record, p) for record, counts, p in rows if counts]))
    found = gather_object(found)
    sums = torch.zeros(len(val.records), sum(classifier.sizes), dtype=torch.float64)
    times = torch.zeros(len(val.records), 1)
    for _, _, rows in found:
        for record, probability in rows:
            sums[record] += probability
            times[record] += 1
    means = (sums / times.clamp(min=1)).split(classifier.sizes, dim=1)
    probabilities = [part.numpy() for part in means]
    labels = np.where(times.numpy() == 0, UNLABELLED, val.labels)  # of which nothing could be read
    if not (labels != UNLABELLED).any():
        raise ValueError("no validation record's input can be read; see the messages above")
    scores = score_all(probabilities, labels, classifier.class_names)
    val_loss = sum(loss for loss, _, _ in found) / max(1, sum(count for _, count, _ in found))
    flat = {"val_loss": val_loss, **for_log(scores)}
    if state.note(-val_loss if args.best_metric == "loss" else flat["val_balanced_accuracy"]):
        run_dir = Path(args.output_dir)
        if accelerator.is_main_process:
            ids = [record.id for record in val.records]
            save_scores(run_dir, scores, ids, probabilities, labels, classifier.class_names)
        save_result(accelerator, classifier, run_dir / "best_model")
    return flat
