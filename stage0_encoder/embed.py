r"""Embed records with a model of train_contrastive.py: vectors of images or slides and of their texts, in one space.

  python stage0_encoder/embed.py --model runs/siglip/final_model --records captions.json --image_root images/ \
      --output_dir embedded

writes embedded/embeddings.npz (images and texts, a row an item) and embedded/items.csv (what each row is), and prints
the recall of retrieval as JSON. With --class_prompts it writes the class of every item to items.csv as well, and with
--class_labels prints how often it is right. Processes that `accelerate launch` starts share the items.
"""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt

from accelerator_setup import make_accelerator
from command_line import DONE, SOME_FAILED, check_output_folder, make_parser, run
from slide_features import atomic_path
from slide_reports import RecordBatches, read_records, with_inputs
from stage0_encoder.alignment_model import load_alignment
from stage0_encoder.pairs import Items, PairDataset, make_pair_loader
from stage0_encoder.retrieval import (
    Embeddings,
    classify,
    embed_all,
    read_zero_shot,
    retrieval_scores,
    zero_shot_scores,
)


def parse_arguments():
    parser = make_parser(__doc__)
    parser.add_argument("--model", required=True, help="final_model (or best_model) of train_contrastive.py")
    parser.add_argument("--records", required=True, help="records in any form that docs/records.md lists")
    parser.add_argument("--features_dir", default=None, help="folder of stage 0's <slide_id>.h5")
    parser.add_argument("--image_root", default=None, help="folder that `image` in the records is relative to")
    parser.add_argument("--output_dir", required=True, help="folder to write to; made when missing")
    parser.add_argument("--format", choices=["npz", "safetensors"], default="npz", help="of the embeddings")
    parser.add_argument("--class_prompts", default=None, help="JSON of classes and their prompts")
    parser.add_argument("--class_labels", default=None, help="CSV with columns id and label: the class of records")
    parser.add_argument("--batch_size", type=PositiveInt, default=64, help="items per process and forward pass")
    parser.add_argument("--num_workers", type=NonNegativeInt, default=2, help="reader processes per process; 0: none")
    parser.add_argument(
        "--mixed_precision",
        choices=["no", "bf16"],
        default=None,
        help="precision of activations; default: that of `accelerate config`",
    )
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    check_output_folder(args.output_dir)
    if args.class_labels and not args.class_prompts:
        raise ValueError("--class_labels needs --class_prompts, which says what the classes are")
    zero_shot = read_zero_shot(args.class_prompts, args.class_labels) if args.class_prompts else None

    # Model
    model = load_alignment(args.model)
    kind = model.settings.input_kind
    if (kind == "images") != bool(args.image_root) or (kind == "features") != bool(args.features_dir):
        flag = "--image_root" if kind == "images" else "--features_dir"
        raise ValueError(f"{args.model} was trained on {kind}; give {flag} alone")

    # Data
    found = read_records(args.records, features_dir=args.features_dir, image_root=args.image_root)
    records, problems = with_inputs(found, model.settings.features_made or None)
    if not len(records):
        raise ValueError(f"{args.records}: no record to embed ({problems[0]})")
    accelerator = make_accelerator(output_dir=args.output_dir, seed=0, mixed_precision=args.mixed_precision)
    dataset = PairDataset(
        records,
        Items.of(records),
        model.text.tokens(model.settings.max_text_tokens),
        model.settings.num_patches,
        image_transform=model.image.transform if args.image_root else None,
        expected=model.settings.features_made,
    )
    batches = RecordBatches(len(dataset), args.batch_size, num_processes=accelerator.num_processes)
    loader = accelerator.prepare_data_loader(make_pair_loader(dataset, batches, args.num_workers))

    # Embed
    model = accelerator.prepare_model(model, evaluation_mode=True)  # nothing learns, so DDP has nothing to do
    embedded = embed_all(accelerator, model, loader, quiet=False)
    bare = accelerator.unwrap_model(model)
    cases, texts = (torch.from_numpy(c)[embedded.items] for c in (dataset.items.cases, dataset.items.texts))
    scores = retrieval_scores(embedded.images, embedded.texts, cases, texts)
    classes = None
    if zero_shot is not None:
        classes = classify(accelerator, bare, embedded, zero_shot.prompts)
        ids = [records[int(dataset.items.records[item])].id for item in embedded.items.tolist()]
        scores |= zero_shot_scores(classes, ids, zero_shot.labels)

    # Save
    num_bad = len(dataset) - len(embedded.items)
    if accelerator.is_main_process:
        write(Path(args.output_dir), args.format, embedded, dataset, classes)
        for line in problems:
            print(f"left out: {line}", file=sys.stderr)
        print(json.dumps(scores | {"items": len(embedded.items), "left_out": num_bad + len(problems)}, indent=2))
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return SOME_FAILED if problems or num_bad else DONE


def write(folder: Path, form: str, embedded: Embeddings, dataset: PairDataset, classes: list[str] | None) -> None:
    """Write the embeddings, (I, D) float32 of images and of texts, and items.csv, which says what each row is."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {"images": embedded.images.numpy(), "texts": embedded.texts.numpy()}
    with atomic_path(folder / f"embeddings.{form}") as path:
        if form == "npz":
            with path.open("wb") as file:
                np.savez(file, **arrays)
        else:
            from safetensors.numpy import save_file

            save_file(arrays, path)
    with atomic_path(folder / "items.csv") as path, path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["row", "id", "input", "patient", "case", "text", *(["class"] if classes else [])])
        for row, item in enumerate(embedded.items.tolist()):
            record = dataset.records[int(dataset.items.records[item])]
            name = record.inputs[int(dataset.items.inputs[item])].name
            numbers = int(dataset.items.cases[item]), int(dataset.items.texts[item])
            writer.writerow([row, record.id, name, record.group, *numbers, *([classes[row]] if classes else [])])


if __name__ == "__main__":
    run(main)
