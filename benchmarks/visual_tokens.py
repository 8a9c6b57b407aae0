r"""What reducers and projectors cost on one slide: time, weights, visual tokens, as ratios measured in one run.

    python benchmarks/visual_tokens.py --json visual_tokens.json
    python benchmarks/visual_tokens.py --device cuda --json visual_tokens.json

A slide's patch tokens are drawn around 20 kinds of tissue and a few rare ones, on a grid of tiles with holes. Times are
medians (on a CPU of CPU time) of reducing and projecting in evaluation, and of the same forwards and backwards with all
weights learning. Each reducer stands before mlp2x_gelu and each projector behind grid_pool; the ratios are to
mlp2x_gelu on as many patch tokens as there are visual tokens, which is what `none` costs in training.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from projectors import PROMPT_TOPK, REDUCERS, build_position_codes, build_projector, build_reducer, closeness

PROJECTORS = ("linear", "mlp2x_gelu", "mlp2x_gelu_gamma", "ln_mlp2x_gelu", "mlp3x_gelu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, default=10_000, help="patch tokens of the slide (default: 10000)")
    parser.add_argument("--patch_width", type=int, default=1536, help="their width (default: 1536, UNI2-h)")
    parser.add_argument(
        "--llm_width", type=int, default=2048, help="of the language model (default: 2048, Gemma-3n E2B)"
    )
    parser.add_argument("--num_visual_tokens", type=int, default=256, help="budget (default: 256)")
    parser.add_argument("--repeats", type=int, default=5, help="repetitions, after one to warm up (default: 5)")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--json", type=Path, default=None, help="file to write all figures to")
    args = parser.parse_args()
    torch.manual_seed(0)
    slide = [part.to(args.device) for part in draw_slide(args.tiles, args.patch_width)]
    few = [part[:, :: -(-args.tiles // args.num_visual_tokens)] for part in slide]
    rows = [("none, tokens drawn before", "none", "mlp2x_gelu", "none", few)]
    rows += [(name, name, "mlp2x_gelu", "none", slide) for name in (*REDUCERS, PROMPT_TOPK)]
    rows += [("grid_pool, sincos", "grid_pool", "mlp2x_gelu", "sincos", slide)]
    rows += [(f"grid_pool, {name}", "grid_pool", name, "none", slide) for name in PROJECTORS]
    figures = []
    for label, reducer, projector, codes, inputs in rows:
        modules = build(reducer, projector, codes, args).to(args.device)
        figures.append({"name": label} | measure(modules, inputs, args))
        with_ratios = figures[-1]
        for kind in ("evaluation", "training"):
            with_ratios[f"{kind}_ratio"] = with_ratios[f"{kind}_s"] / figures[0][f"{kind}_s"]
        print(
            f"{label:28} {with_ratios['evaluation_s'] * 1e3:8.0f} ms ({with_ratios['evaluation_ratio']:5.1f} x)"
            f" {with_ratios['training_s'] * 1e3:8.0f} ms ({with_ratios['training_ratio']:5.1f} x)"
            f" {with_ratios['weights'] / 1e6:6.1f} M weights {with_ratios['visual_tokens']:4} visual tokens"
        )
    if args.json:
        about = {name: value for name, value in vars(args).items() if name != "json"}
        about |= {"cpus": os.cpu_count(), "threads": torch.get_num_threads(), "load": os.getloadavg()[0]}
        args.json.write_text(json.dumps(about | {"figures": figures}, indent=1) + "\n")


def draw_slide(num_tiles: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Patch tokens (1, N, E), coords (1, N, 2) and mask (1, N)."""
    kinds = torch.randn(20, width)[torch.randint(0, 20, (num_tiles,))]
    tokens = kinds + 0.5 * torch.randn(num_tiles, width)
    tokens[torch.rand(num_tiles) < 0.03] *= 2
    side = int((1.5 * num_tiles) ** 0.5) + 1
    places = torch.randperm(side * side)[:num_tiles].sort().values
    coords = 512 * torch.stack([places % side, places // side], dim=-1)
    return tokens[None], coords[None], torch.ones(1, num_tiles, dtype=torch.bool)


def build(reducer: str, projector: str, codes: str, args: argparse.Namespace) -> nn.ModuleDict:
    reduce = build_reducer(reducer, args.patch_width, args.num_visual_tokens)
    project = build_projector(projector, reduce.output_width, args.llm_width)
    position_codes = build_position_codes(codes, args.patch_width)
    return nn.ModuleDict({"codes": position_codes, "reducer": reduce, "projector": project})


def measure(modules: nn.ModuleDict, inputs: list[Tensor], args: argparse.Namespace) -> dict[str, float]:
    question = torch.randn(1, args.llm_width, device=args.device)
    asks = type(modules["reducer"]).__name__ == "PromptTopK"

    def forward() -> tuple[Tensor, Tensor]:
        tokens, coords, mask = inputs
        tokens = modules["codes"](tokens, coords, mask, 0.25)
        guide = {"closeness": closeness(modules["projector"], tokens, question)} if asks else {}
        reduced, reduced_mask = modules["reducer"](tokens, coords, mask, None, **guide)
        return modules["projector"](reduced), reduced_mask

    @torch.no_grad()
    def evaluate() -> None:
        forward()

    def train() -> None:
        forward()[0].pow(2).sum().backward()

    with torch.no_grad():
        visual_tokens = int(forward()[1].sum())
    return {
        "evaluation_s": median_seconds(evaluate, args),
        "training_s": median_seconds(train, args),
        "weights": sum(parameter.numel() for parameter in modules.parameters()),
        "visual_tokens": visual_tokens,
    }


def median_seconds(work, args: argparse.Namespace) -> float:
    """CPU seconds on the CPU, which others on the machine do not change, and seconds on a GPU."""
    clock = time.process_time if args.device == "cpu" else time.perf_counter
    seconds = []
    for repetition in range(-1, args.repeats):
        began = clock()
        work()
        if args.device != "cpu":
            torch.cuda.synchronize(args.device)
        if repetition >= 0:
            seconds.append(clock() - began)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
