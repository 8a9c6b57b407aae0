r"""How much of an encoder's own speed is left when it encodes a slide, as a ratio measured in one run on one machine.

    python benchmarks/stage0_encoder.py --json encoder.json                     ViT-S/16 on the CPU
    python benchmarks/stage0_encoder.py --device cuda --json encoder.json       ViT-L/16 in bfloat16 on a GPU

A JPEG-tiled SVS is made, 30 % of it tissue. `encode_slide` opens it, finds its tissue, decodes, resizes and crops every
tile of 256 px to the encoder's 224 and encodes it. The bare encoder gets as many tensors of the right shape that are
ready on the device, in batches of the same size and precision, and its features are fetched as ours are. Weights are
random. Every repetition measures both, one after the other, each first in every other one, and the ratio is the median
of the repetitions' ratios: 1 means that reading costs nothing.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

from benchmarks.make_slides import make_slide
from encoders import load_encoder
from image_encoder import ImageEncoder
from stage0_tiling.encoding import encode_slide

DEFAULTS = {  # by kind of device: architecture, tiles per batch, level-0 pixels of the slide's sides
    "cpu": ("vit_small_patch16_224", 64, 10_000),
    "cuda": ("vit_large_patch16_224", 256, 40_000),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(DEFAULTS), default="cpu", help="default: cpu")
    parser.add_argument("--architecture", default=None, help="of timm; default: ViT-S/16, on a GPU ViT-L/16")
    parser.add_argument("--batch_size", type=int, default=None, help="default: 64, on a GPU 256")
    parser.add_argument("--side", type=int, default=None, help="level-0 pixels of the slide (default: 10000; 40000)")
    parser.add_argument("--num_workers", type=int, default=4, help="threads that read tiles (default: 4)")
    parser.add_argument("--repeats", type=int, default=5, help="repetitions, after one to warm up (default: 5)")
    parser.add_argument(
        "--work_dir", type=Path, default=None, help="where the slide is made and kept; default: not kept"
    )
    parser.add_argument("--json", type=Path, default=None, help="file to write all figures to")
    args = parser.parse_args()
    architecture, batch_size, side = DEFAULTS[args.device]
    architecture, batch_size, side = args.architecture or architecture, args.batch_size or batch_size, args.side or side
    device = torch.device(args.device)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    encoder = load_encoder(architecture, pretrained=False).to(device)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        path = (args.work_dir or Path(scratch)) / f"encoder_{side}.svs"
        make_slide(path, side, tissue=0.3, mpp=0.5)
        settings = {"batch_size": batch_size, "dtype": dtype, "num_workers": args.num_workers}
        num_tiles = len(encode_slide(path, encoder, **settings).features)  # warms up

        def slide() -> None:
            encode_slide(path, encoder, **settings)

        def bare() -> None:
            encode_ready(encoder, num_tiles, batch_size, dtype)

        seconds, cpu_seconds = ({"slide": [], "bare": []} for _ in range(2))
        for repetition in range(-1, args.repeats):
            for name, work in sorted({"slide": slide, "bare": bare}.items(), reverse=repetition % 2 == 0):
                began, cpu_began = time.perf_counter(), time.process_time()
                work()
                if repetition >= 0:
                    seconds[name].append(time.perf_counter() - began)
                    cpu_seconds[name].append(time.process_time() - cpu_began)
    ratio, cpu_ratio = (
        statistics.median(bare / slide for slide, bare in zip(found["slide"], found["bare"], strict=True))
        for found in (seconds, cpu_seconds)
    )
    speed = {name: num_tiles / statistics.median(found) for name, found in seconds.items()}
    print(f"{architecture} on {args.device}, {dtype}, {num_tiles} tiles, {os.cpu_count()} CPUs, load before {load:.1f}")
    print(f"slide {speed['slide']:.1f} tiles/s, bare encoder {speed['bare']:.1f}: {ratio:.3f} of it")
    print(f"of the CPU time that a slide takes, the bare encoder takes {cpu_ratio:.3f}, whoever else uses the machine")
    if args.json:
        about = {"architecture": architecture, "device": args.device, "tiles": num_tiles, "load_before": load}
        figures = about | {"ratio": ratio, "cpu_ratio": cpu_ratio, "tiles_per_s": speed}
        figures |= {"seconds": seconds, "cpu_seconds": cpu_seconds}
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


@torch.inference_mode()
def encode_ready(encoder: ImageEncoder, num_tiles: int, batch_size: int, dtype: torch.dtype) -> np.ndarray:
    """Encode tensors that are ready: no decoding, no transform, no copy to the device."""
    device = next(encoder.parameters()).device
    ready = torch.randn(batch_size, 3, encoder.image_size, encoder.image_size, device=device)
    features = []
    with nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype):
        for start in range(0, num_tiles, batch_size):
            features.append(encoder.encode_tiles(ready[: num_tiles - start]).to(torch.float16))
    return torch.cat(features).cpu().numpy()


if __name__ == "__main__":
    main()
