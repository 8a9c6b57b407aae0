"""The `gpu` part of `train_step.py`: steps of an E2B-shaped Gemma-3n of random weights, in bfloat16 on one GPU.

For stage 1, stage 2 with LoRA, and QLoRA with the per-layer table in CPU memory: samples/s, peak of allocated memory,
and model FLOP/s as a share of the rate at which this GPU multiplies large bfloat16 matrices, measured first. The FLOPs
are the products of matrices and the attention that one step asks for, counted by torch's flop counter on the same batch
with no activation checkpointing: forward, gradients of activations, and gradients of the weights that learn. What
checkpointing computes again does not count, nor does what 4-bit weights cost to unpack.

The aims: at least 40 % of the matrix rate in stage 2 with LoRA, and at most 12 GB with QLoRA and the table on the CPU.
"""

import gc
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

from benchmarks.training_batches import ask, make_batch, make_model, read_reports
from language_model import add_lora
from per_layer_table import PerLayerTable, without_table
from slide_vlm import SlideVLM

PATCH_WIDTH = 1536
MATRIX = 8192  # rows and columns of the matrices that tell the GPU's rate
WAYS = ("stage 1", "stage 2, LoRA", "stage 2, QLoRA, table on the CPU")


def measure_gpu(batch_size: int, num_visual_tokens: int, repeats: int) -> tuple[dict, str]:
    """All figures, and a line that says them."""
    rate = matrix_rate()
    records, tokenizer = ask(read_reports(400)[0], mixed=False)
    batch = make_batch(records[:batch_size], num_visual_tokens, PATCH_WIDTH)
    batch = {name: value.cuda() for name, value in batch.items()}
    found = {"gpu": torch.cuda.get_device_name(), "matrix_flop_per_s": rate, "batch_size": batch_size}
    flops = {}
    for way in WAYS:
        for checkpointing in (False, True):
            name = way + (", checkpointing" if checkpointing else "")
            try:
                found[name] = measure_way(way, checkpointing, batch, batch_size, tokenizer, num_visual_tokens, repeats)
            except ImportError as error:
                found[name] = {"skipped": str(error)}
            except torch.cuda.OutOfMemoryError:
                found[name] = {"skipped": f"more than {torch.cuda.get_device_properties(0).total_memory} bytes"}
            gc.collect()
            torch.cuda.empty_cache()
            flops[way] = flops.get(way) or found[name].get("model_flops")
            # Flops of 4-bit products are not counted: the same products as with LoRA.
            counted = flops["stage 2, LoRA"] if "QLoRA" in way else flops[way]
            if "seconds" in found[name] and counted:
                found[name]["share_of_matrix_rate"] = counted / found[name]["seconds"] / rate
    each = [f"{name}: {told(figures)}" for name, figures in found.items() if isinstance(figures, dict)]
    return found, f"{found['gpu']}, {rate / 1e12:.0f} TFLOP/s in matrices\n         " + "\n         ".join(each)


def told(figures: dict) -> str:
    if "skipped" in figures:
        return f"skipped: {figures['skipped']}"
    share = f"{figures['share_of_matrix_rate']:.1%} of the matrix rate" if "share_of_matrix_rate" in figures else ""
    return f"{figures['samples_per_s']:.1f} samples/s, {figures['peak_bytes'] / 1e9:.1f} GB, {share}"


def measure_way(
    way: str, checkpointing: bool, batch: dict[str, Tensor], batch_size: int, tokenizer, visual: int, repeats: int
) -> dict:
    """Seconds of a step, samples/s, peak memory and, without checkpointing, model FLOPs."""
    torch.cuda.reset_peak_memory_stats()
    model = build(way, tokenizer, visual)
    if checkpointing:
        model.enable_gradient_checkpointing()
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)

    def step() -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            nll = model(batch)
        nll.mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    seconds = timed(step, repeats)
    found = {"seconds": seconds, "samples_per_s": batch_size / seconds, "peak_bytes": torch.cuda.max_memory_allocated()}
    if not checkpointing:
        with FlopCounterMode(display=False) as counter:
            step()
        found["model_flops"] = counter.get_total_flops()
    return found


def build(way: str, tokenizer, num_visual_tokens: int) -> SlideVLM:
    """The model of a stage, on the GPU, its language model in bfloat16 or 4 bits."""
    is_qlora, torch_dtype = "QLoRA" in way, torch.get_default_dtype()
    torch.manual_seed(0)
    config = e2b_config()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("cuda"):
            llm = (without_table(Gemma3nForCausalLM) if is_qlora else Gemma3nForCausalLM)(config).eval()
    finally:
        torch.set_default_dtype(torch_dtype)
    if is_qlora:
        from four_bit import FourBit, quantize

        width = config.num_hidden_layers * config.hidden_size_per_layer_input
        rows = torch.empty(config.vocab_size_per_layer_input, width, dtype=torch.bfloat16).normal_(std=0.02)
        scale = torch.tensor(config.hidden_size_per_layer_input**0.5)
        llm.get_decoder().embed_tokens_per_layer = PerLayerTable(rows, scale.cuda(), torch.bfloat16)
        quantize(llm, FourBit(), "cuda")
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()  # weights come to a GPU in 4 bits where there is a checkpoint to read
    model = make_model(llm, tokenizer, num_visual_tokens, PATCH_WIDTH)
    if way != "stage 1":
        model.projector.requires_grad_(False)
        model.llm = add_lora(model.llm, rank=16, alpha=32, dropout=0.05)
    return model.cuda()


def e2b_config() -> Gemma3nTextConfig:
    """The sizes of the text part of Gemma-3n E2B, as its configuration states them."""
    return Gemma3nTextConfig(
        num_hidden_layers=30,
        intermediate_size=[8192] * 30,
        layer_types=(["sliding_attention"] * 4 + ["full_attention"]) * 6,
        num_kv_shared_layers=10,
        activation_sparsity_pattern=[0.95] * 10 + [0.0] * 20,
    )


def matrix_rate() -> float:
    """FLOP/s of products of large bfloat16 matrices on this GPU."""
    left, right = (torch.randn(MATRIX, MATRIX, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    product = torch.empty_like(left)

    def multiply() -> None:
        torch.mm(left, right, out=product)

    multiply()
    return 2 * MATRIX**3 / timed(multiply, 20)


def timed(work: Callable[[], None], repeats: int) -> float:
    """Mean seconds of some repetitions, the GPU being done before and after."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / repeats
