"""What train_classifier.py prepares from its flags: usable records, encoder, augmentation; and its evaluation."""

from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from timm.data import create_transform

from encoder_lora import add_encoder_lora
from encoders import ImageEncoder, load_encoder
from slide_encoders import GatedAttention
from slide_features import count_tiles, read_slide_features
from slide_reports import with_inputs
from stage0_encoder.classification_scores import for_log, save_scores, score_all
from stage0_encoder.classifier import OWN_NETWORKS, Classifier, balanced_weights, own_cnn, own_vit
from stage0_encoder.labels import UNLABELLED, LabelledRecords
from stage0_encoder.tile_files import write_all_tiles


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
    """The image encoder, or gated attention for bags, before anything of it learned."""
    if args.input == "bags":
        first = next(path for record in train.records for path in record.inputs if count_tiles(path))
        width = read_slide_features(first).features.shape[1]
        return GatedAttention(width, args.bag_width, attention_width=args.bag_attention_width, dropout=args.bag_dropout)
    if args.encoder == "vit":
        sizes = {"width": args.vit_width, "depth": args.vit_depth, "num_heads": args.vit_heads}
        return own_vit(image_size=args.image_size, patch_size=args.vit_patch_size, **sizes)
    if args.encoder == "cnn":
        return own_cnn(image_size=args.image_size, width=args.cnn_width, depths=args.cnn_depths)
    return load_encoder(args.encoder, pretrained=not args.random_weights)


def choose_what_learns(args, encoder) -> None:
    """Freeze the encoder, put adapters on it, or let all of it learn."""
    if args.input == "bags" or args.encoder in OWN_NETWORKS or args.encoder_training == "full":
        encoder.requires_grad_(True)
        return
    encoder.requires_grad_(False)
    if args.encoder_training == "lora":
        add_encoder_lora(encoder, rank=args.lora_rank, alpha=args.lora_alpha, dropout=args.lora_dropout)


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


@torch.no_grad()
def evaluate(accelerator, classifier: Classifier, loader, val: LabelledRecords, args, state) -> dict[str, float]:
    """Scores for the log; a best model is saved with its scores. Collective: call on every rank.

    The loss is the mean over labels of examples; classes are chosen by the mean probability of a record's examples.
    """
    classifier.eval()
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
        if accelerator.is_main_process:
            run_dir = Path(args.output_dir)
            classifier.save(run_dir / "best_model")
            ids = [record.id for record in val.records]
            save_scores(run_dir, scores, ids, probabilities, labels, classifier.class_names)
        accelerator.wait_for_everyone()
    return flat
