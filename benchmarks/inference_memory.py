r"""How much memory generate.py takes for a model with weights of its own, as a ratio to those weights as they are run.

    python benchmarks/inference_memory.py --megabytes 400
    python benchmarks/inference_memory.py --family gemma3n --megabytes 4500 --folder /scratch

A random language model is laid down as stage 2 saves a fully trained or merged one, tensor by tensor, so that making
it takes no more memory than its largest table. The peak of resident memory (VmHWM) of generate.py with it is measured
in a child, and printed over the size of the weights; so is the peak less that with a model of almost no weights, which
leaves out libraries and all else. Weights that are converted as they load weigh what they do afterwards.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from inference.loading import default_dtype
from language_model import choose_placeholder
from slide_features import write_slide_features
from slide_reports import Prompt
from slide_vlm import SlideVLM
from vlm_settings import VLMSettings

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHARD_BYTES = 500_000_000
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
    parser.add_argument("--family", choices=sorted(FAMILIES), default="llama", help="default: llama")
    parser.add_argument("--megabytes", type=int, default=400, help="about so many of weights (default: 400)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32", help="saved in (default: fp32)")
    parser.add_argument("--run_dtype", choices=sorted(DTYPES), default=None, help="run in (default: generate.py's)")
    parser.add_argument("--folder", type=Path, default=None, help="to put the model in meanwhile (default: /tmp)")
    parser.add_argument("--json", type=Path, default=None, help="file to write the figures to")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        small, _ = peak_and_weights(Path(folder) / "small", args.family, 1, args.dtype, args.run_dtype)
        large, on_disk = peak_and_weights(
            Path(folder) / "large", args.family, args.megabytes, args.dtype, args.run_dtype
        )
    run_dtype = DTYPES[args.run_dtype] if args.run_dtype else default_dtype(torch.device("cpu")) or DTYPES[args.dtype]
    weights = on_disk * run_dtype.itemsize // DTYPES[args.dtype].itemsize
    ratios = {"peak / weights": large / weights, "without libraries": (large - small) / weights}
    sizes = {"weights on disk": on_disk, "weights as run": weights, "peak": large, "peak without weights": small}
    print(f"{args.family}, {args.dtype} run in {str(run_dtype).removeprefix('torch.')}")
    print(", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in sizes.items()))
    print(", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()))
    if args.json:
        about = {"family": args.family, "dtype": args.dtype, "run_dtype": str(run_dtype)}
        args.json.write_text(json.dumps(about | sizes | ratios, indent=1) + "\n")


def peak_and_weights(folder: Path, family: str, megabytes: int, dtype: str, run_dtype: str | None) -> tuple[int, int]:
    """Bytes of the peak of generate.py with such a model, and of its weights; the model is made in a child as well."""
    wanted = f"{str(folder)!r}, {family!r}, {megabytes}, {dtype!r}"
    make = f"from benchmarks.inference_memory import make; make({wanted})"
    subprocess.run([sys.executable, "-c", make], check=True, cwd=ROOT)
    flags = ["--model", folder / "final_model", "--features", folder / "x.h5", "--num_beams", "1"]
    flags += ["--max_new_tokens", "4", "--device", "cpu", *(["--dtype", run_dtype] if run_dtype else [])]
    command = [sys.executable, "-c", CHILD, "inference/generate.py", *map(str, flags)]
    done = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)
    peak = int(next(line for line in done.stderr.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024
    files = (folder / "final_model" / "language_model").glob("*.safetensors")
    return peak, sum(file.stat().st_size for file in files)


def make(folder: str, family: str, megabytes: int, dtype: str) -> None:
    """Write a result folder and a feature file."""
    tokenizer = make_tokenizer()
    with torch.device("meta"):
        llm = FAMILIES[family](megabytes * 1e6 / DTYPES[dtype].itemsize).to(DTYPES[dtype]).requires_grad_(False)
    settings = VLMSettings(
        "none",
        16,
        num_visual_tokens=16,
        placeholder_id=choose_placeholder(llm),
        prompt=vars(Prompt.for_tokenizer(tokenizer)),
        question="Report?",
    )
    SlideVLM(llm, settings).save(Path(folder) / "final_model", tokenizer)
    write_random_weights(llm, Path(folder) / "final_model" / "language_model")
    coords = np.stack([np.arange(16), np.zeros(16, dtype=np.int64)], axis=1) * 256
    features = np.random.default_rng(0).normal(size=(16, 16)).astype(np.float16)
    making = {"encoder": "none", "mpp": 0.5, "overlap": 0, "tile_size": 256, "patch_size_level0": 256}
    write_slide_features(Path(folder) / "x.h5", features, coords, name="x", **making)


def write_random_weights(llm: PreTrainedModel, folder: Path) -> None:
    """A checkpoint of a model that has shapes only, shard by shard."""
    torch.manual_seed(0)
    folder.mkdir()
    llm.config.dtype = llm.dtype
    llm.config.save_pretrained(folder)
    shards: list[list[str]] = [[]]
    weights, size = dict(llm.named_parameters()), 0  # a tied head comes once
    for name, weight in weights.items():
        if size + weight.nbytes > SHARD_BYTES and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += weight.nbytes
    files = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file({name: random_like(weights[name]) for name in names}, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(w.nbytes for w in weights.values())}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def random_like(weight: torch.Tensor) -> torch.Tensor:
    """Values of the spread that layers begin with; scales of norms are about 1."""
    values = torch.empty(weight.shape, dtype=weight.dtype)
    return values.uniform_(-0.03, 0.03) if weight.ndim > 1 else values.uniform_(0.9, 1.1)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<eos>", *alphabet])}
    pieces = Tokenizer(models.BPE(vocabulary, []))
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=pieces, eos_token="<eos>")


def make_llama(parameters: float) -> PreTrainedModel:
    """Layers of 12.6 M weights each, as many as make up the number."""
    is_small = parameters < 3e6
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=32 if is_small else 1024,
        intermediate_size=64 if is_small else 2730,
        num_hidden_layers=1 if is_small else max(1, round(parameters / (12 * 1024 * 1024))),
        num_attention_heads=8,
        max_position_embeddings=512,
    )
    return LlamaForCausalLM(config)


def make_gemma3n(parameters: float) -> PreTrainedModel:
    """Gemma-3n's vocabulary of 262,400, its pattern of layers, and as in E2B nearly half of all weights in the table of
    per-layer embeddings.
    """
    is_small = parameters < 3e6
    words, layers = (512, 5) if is_small else (262_144, 15)
    config = Gemma3nTextConfig(
        vocab_size=words + 256,
        vocab_size_per_layer_input=words,
        hidden_size=32 if is_small else 1024,
        intermediate_size=[64 if is_small else 4096] * layers,
        num_hidden_layers=layers,
        layer_types=(["sliding_attention"] * 4 + ["full_attention"]) * (layers // 5),
        num_kv_shared_layers=0 if is_small else 5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8 if is_small else 128,
        hidden_size_per_layer_input=8 if is_small else max(8, round((parameters - 5.3e8) / words / layers)),
        laurel_rank=4 if is_small else 64,
        altup_num_inputs=4,
        activation_sparsity_pattern=[0.0] * layers,
        max_position_embeddings=512,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    return Gemma3nForCausalLM(config)


FAMILIES = {"llama": make_llama, "gemma3n": make_gemma3n}


if __name__ == "__main__":
    main()
