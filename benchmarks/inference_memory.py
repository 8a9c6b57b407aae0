r"""How much memory generate.py takes for a model with weights of its own, as a ratio to those weights.

    python benchmarks/inference_memory.py --megabytes 400

A random language model is saved as stage 2 saves a fully trained or merged one. The peak of resident memory (VmHWM) of
generate.py with it is measured in a child, and so is that with a model of almost no weights: the difference is what the
weights cost, libraries and all else left out. With --dtype as saved, nothing is converted.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from language_model import choose_placeholder, fingerprint
from slide_features import write_slide_features
from slide_reports import Prompt
from slide_vlm import SlideVLM, VLMSettings

ROOT = Path(__file__).resolve().parent.parent
CHILD = """
import runpy, sys
from pathlib import Path
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    lines = Path("/proc/self/status").read_text().splitlines()
    print(next(line for line in lines if line.startswith("VmHWM")), file=sys.stderr)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=400, help="of the language model's weights (default: 400)")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="saved and run in (default: fp32)")
    parser.add_argument("--json", type=Path, default=None, help="file to write the figures to")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        small, _ = peak_and_weights(Path(folder) / "small", 1, args.dtype)
        large, weights = peak_and_weights(Path(folder) / "large", args.megabytes, args.dtype)
    ratio = (large - small) / weights
    sizes = {"weights": weights, "peak": large, "peak without weights": small}
    print(", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in sizes.items()) + f": ratio {ratio:.2f}")
    if args.json:
        figures = {"weights": weights, "peak": large, "peak_without": small, "ratio": ratio, "dtype": args.dtype}
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


def peak_and_weights(folder: Path, megabytes: int, dtype: str) -> tuple[int, int]:
    """Bytes of the peak of generate.py with such a model, and of its weights; the model is made in a child as well."""
    make = f"from benchmarks.inference_memory import make; make({str(folder)!r}, {megabytes}, {dtype!r})"
    subprocess.run([sys.executable, "-c", make], check=True, cwd=ROOT)
    flags = ["--model", folder / "final_model", "--features", folder / "x.h5", "--num_beams", "1"]
    flags += ["--max_new_tokens", "4", "--device", "cpu", "--dtype", dtype]
    command = [sys.executable, "-c", CHILD, "inference/generate.py", *map(str, flags)]
    done = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)
    peak = int(next(line for line in done.stderr.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024
    files = (folder / "final_model" / "language_model").glob("*.safetensors")
    return peak, sum(file.stat().st_size for file in files)


def make(folder: str, megabytes: int, dtype: str) -> None:
    """Write a result folder and a feature file."""
    torch.manual_seed(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<eos>", *alphabet])}
    pieces = Tokenizer(models.BPE(vocabulary, []))
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, eos_token="<eos>")
    width = {"fp32": 4, "bf16": 2}[dtype]
    per_layer = 12 * 1024 * 1024 * width
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=1024 if megabytes > 10 else 32,
        intermediate_size=2730 if megabytes > 10 else 64,
        num_hidden_layers=max(1, round(megabytes * 1e6 / per_layer)) if megabytes > 10 else 1,
        num_attention_heads=8,
        max_position_embeddings=512,
    )
    llm = LlamaForCausalLM(config).to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    settings = VLMSettings(
        "none",
        16,
        num_visual_tokens=16,
        placeholder_id=choose_placeholder(llm),
        llm_fingerprint=fingerprint(llm),
        prompt=vars(Prompt.for_tokenizer(tokenizer)),
        question="Report?",
    )
    SlideVLM(llm, settings).save(Path(folder) / "final_model", tokenizer)
    coords = np.stack([np.arange(16), np.zeros(16, dtype=np.int64)], axis=1) * 256
    features = np.random.default_rng(0).normal(size=(16, 16)).astype(np.float16)
    making = {"encoder": "none", "mpp": 0.5, "overlap": 0, "tile_size": 256, "patch_size_level0": 256}
    write_slide_features(Path(folder) / "x.h5", features, coords, name="x", **making)


if __name__ == "__main__":
    main()
