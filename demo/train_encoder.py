r"""Train the demo's image encoder: a small timm network that tells the training slides' reports apart by their tiles.

    python stage0_tiling/tile.py --slides demo/output/slides --output_dir demo/output/stage0 --tile_size 64 --mpp 2
    python demo/train_encoder.py --data_dir demo/output --coords_dir demo/output/stage0/coords \
        --output_dir demo/output/encoder

Labels are weak: each tile takes organ, diagnosis and grade of its slide's report. The result is a folder in timm's hub
layout (config.json, model.safetensors, no classifier), which `--encoder` of stage 0 opens. Accuracy on the test
slides' tiles is printed and written to OUT/accuracy.json.
"""

import json
import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from command_line import DONE, make_parser, run

LABELS = ("organ", "diagnosis", "grade")


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("--data_dir", type=Path, default=Path("demo/output"), help="folder made by make_slides.py")
    data.add_argument(
        "--coords_dir", type=Path, default=Path("demo/output/stage0/coords"), help="stage 0's tile positions"
    )
    data.add_argument("--output_dir", type=Path, default=Path("demo/output/encoder"), help="folder of the encoder")
    data.add_argument("--max_tiles", type=int, default=48, help="tiles taken of a slide at most, evenly spaced")
    data.add_argument("--num_workers", type=int, default=2, help="threads that read tiles")
    model = parser.add_argument_group("model")
    model.add_argument("--architecture", default="test_resnet", help="any timm architecture")
    training = parser.add_argument_group("training")
    training.add_argument("--num_epochs", type=int, default=6, help="passes over the training tiles")
    training.add_argument("--batch_size", type=int, default=48, help="tiles a step")
    training.add_argument("--learning_rate", type=float, default=4e-3, help="highest, after warm-up")
    training.add_argument("--weight_decay", type=float, default=0.02, help="of AdamW")
    training.add_argument("--seed", type=int, default=0, help="seed of weights, order and augmentation")
    return parser.parse_args(argv)


def read_labels(path: Path) -> dict[str, tuple[int, int, int]]:
    """Map slide_id to the numbers of its organ, its diagnosis, and its whole report, which has the grade."""
    from demo.reports import CASES

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; run demo/make_slides.py first")
    organs = list(dict.fromkeys(case.organ for case in CASES))
    diagnoses = list(dict.fromkeys((case.organ, case.diagnosis) for case in CASES))
    numbers = {
        case.report: (organs.index(case.organ), diagnoses.index((case.organ, case.diagnosis)), number)
        for number, case in enumerate(CASES)
    }
    return {Path(record["id"]).stem: numbers[record["report"]] for record in json.loads(path.read_text())}


def read_tiles(slide_id: str, slides: Path, coords_dir: Path, max_tiles: int) -> Any:
    """Read tiles of one slide, evenly spaced over its tissue: (n, tile_px, tile_px, 3) uint8."""
    import numpy as np

    from slide_features import read_slide_coords
    from stage0_tiling.slide import Slide

    where = read_slide_coords(coords_dir / f"{slide_id}.h5")
    chosen = np.linspace(0, len(where.coords) - 1, min(max_tiles, len(where.coords))).round().astype(int)
    side, size = where.patch_size_level0, (where.tile_size, where.tile_size)
    with Slide(slides / f"{slide_id}.tiff") as slide:
        return np.stack([slide.read_region(int(x), int(y), side, side, size) for x, y in where.coords[chosen]])


def read_split(args: Namespace, split: str) -> tuple[Any, Any]:
    """Read the tiles of a split: pixels (n, 3, tile_px, tile_px) uint8 and labels (n, 3) int64."""
    import numpy as np
    import torch
    from tqdm import tqdm

    labels = read_labels(args.data_dir / f"{split}.json")
    with ThreadPoolExecutor(args.num_workers) as pool:
        jobs = [
            pool.submit(read_tiles, slide_id, args.data_dir / "slides", args.coords_dir, args.max_tiles)
            for slide_id in labels
        ]
        tiles = [job.result() for job in tqdm(jobs, desc=f"{split} tiles", unit="slide")]
    targets = np.repeat(np.array(list(labels.values())), [len(part) for part in tiles], axis=0)
    return torch.from_numpy(np.concatenate(tiles)).permute(0, 3, 1, 2), torch.from_numpy(targets)


def normalise(pixels: Any, mean: Sequence[float], std: Sequence[float]) -> Any:
    """Turn uint8 pixels (B, 3, H, W) into the encoder's floats, channels last, which the CPU convolves faster."""
    import torch

    scale = torch.tensor([mean, std]).view(2, 1, 3, 1, 1)
    return ((pixels.float() / 255 - scale[0]) / scale[1]).contiguous(memory_format=torch.channels_last)


def augment(pixels: Any) -> Any:
    """Turn and mirror a batch, and stain it anew: tissue has no upright, and laboratories differ."""
    import torch

    pixels = torch.rot90(pixels, int(torch.randint(4, ())), (2, 3))
    pixels = pixels.flip(3) if torch.rand(()) < 0.5 else pixels
    darkness = 1 + 0.15 * (torch.rand(len(pixels), 3, 1, 1) - 0.5)
    return 255 - (255 - pixels.float()) * darkness


def save_encoder(model: Any, folder: Path) -> None:
    """Save the network without its classifier in timm's hub layout."""
    import torch
    from timm.models import save_for_hf

    model.reset_classifier(0)
    model.to(memory_format=torch.contiguous_format)  # safetensors stores no other
    model.pretrained_cfg["num_classes"] = 0
    save_for_hf(model, folder, safe_serialization=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = parse_args(argv)
    if not args.coords_dir.is_dir():
        raise FileNotFoundError(f"--coords_dir {args.coords_dir}: no such folder; run stage0_tiling/tile.py first")

    import timm
    import torch
    from torch.nn.functional import cross_entropy
    from tqdm import tqdm

    # Data
    start = time.monotonic()
    torch.manual_seed(args.seed)
    pixels, labels = read_split(args, "train")
    test_pixels, test_labels = read_split(args, "test")
    num_classes = (torch.cat([labels, test_labels]).amax(0) + 1).tolist()

    # Model: one classifier over all labels, cut into three
    config = {
        "tag": "demo",
        "license": "",
        "input_size": (3, *pixels.shape[2:]),
        "test_input_size": None,
        "crop_pct": 1.0,
        "test_crop_pct": None,
        "interpolation": "bicubic",
        "mean": (0.75, 0.6, 0.75),
        "std": (0.22, 0.27, 0.2),
    }
    model = timm.create_model(args.architecture, num_classes=sum(num_classes), pretrained_cfg_overlay=config)
    model = model.to(memory_format=torch.channels_last)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{args.architecture}: {num_parameters:,} parameters, {len(pixels)} training and {len(test_pixels)} test tiles"
    )

    # Optimizer
    num_steps = math.ceil(len(pixels) / args.batch_size) * args.num_epochs
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.learning_rate, total_steps=num_steps, pct_start=0.25
    )

    # Train
    model.train()
    progress = tqdm(total=num_steps, desc="encoder", unit="step")
    for _ in range(args.num_epochs):
        for rows in torch.randperm(len(pixels)).split(args.batch_size):
            logits = model(normalise(augment(pixels[rows]), config["mean"], config["std"])).split(num_classes, 1)
            losses = [cross_entropy(part, labels[rows, i], label_smoothing=0.05) for i, part in enumerate(logits)]
            sum(losses).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            progress.set_postfix(loss=f"{float(sum(losses)):.2f}", refresh=False)
            progress.update()
    progress.close()

    # Accuracy on tiles of patients never seen
    model.eval()
    with torch.inference_mode():
        parts = [model(normalise(part, config["mean"], config["std"])) for part in test_pixels.split(128)]
    right = {
        name: round(float((part.argmax(1) == test_labels[:, i]).float().mean()), 4)
        for i, (name, part) in enumerate(zip(LABELS, torch.cat(parts).split(num_classes, 1), strict=True))
    }

    # Save
    save_encoder(model, args.output_dir)
    (args.output_dir / "accuracy.json").write_text(json.dumps({"tiles": len(test_pixels), **right}, indent=2) + "\n")
    shown = ", ".join(f"{name} {value:.1%}" for name, value in right.items())
    print(f"test tiles right: {shown}; {time.monotonic() - start:.0f} s")
    return DONE


if __name__ == "__main__":
    run(main)
