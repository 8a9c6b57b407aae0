"""Opening a model for inference: where it is, its precision, threads and compilation."""

import math
import os
import re
import sys
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from hub_access import explained
from inference.cpu_products import use_onednn
from inference.memory import LOADING, memory_told
from slide_vlm import SlideVLM
from vlm_loading import load_vlm

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
# What a result folder may hold. Nothing else is fetched: no code, no pickles.
HUB_FILES = [
    "README.md",
    "vlm.json",
    "projector/*.safetensors",
    *(f"{part}/*.{kind}" for part in ("adapter", "language_model", "encoder") for kind in ("json", "safetensors")),
    *(f"tokenizer/*.{kind}" for kind in ("json", "txt", "model", "jinja")),
]


def model_folder(name: str) -> str:
    """A result folder, or where the files of a hub name (`org/name`, `org/name@revision`) were put.

    Raises:
        FileNotFoundError: neither a folder nor a model on the hub.
        ConnectionError, PermissionError: the hub does not give it.
    """
    if Path(name).is_dir() or not HUB_NAME.fullmatch(name):
        return name
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    with explained(f"model {name}", repository, instead="of stage 1 or 2, final_model, that holds vlm.json"):
        folder = snapshot_download(repository, revision=revision or None, allow_patterns=HUB_FILES)
    if not (Path(folder) / "vlm.json").is_file():
        raise FileNotFoundError(f"--model {name}: holds no vlm.json, so it is no model of SlideScribe; name another")
    return folder


@memory_told(LOADING)
def open_model(args, device: str | torch.device | None = None) -> tuple[SlideVLM, PreTrainedTokenizerBase]:
    """Model and tokenizer as the flags say, in evaluation mode on its device; says on stderr where and in what dtype.

    Raises:
        ValueError: it cannot be opened so, or memory is too small for it.
    """
    try:
        device = torch.device(device or args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device or args.device}: {str(error).splitlines()[0]}; use cuda or cpu") from error
    if device.type == "cpu":
        set_threads(getattr(args, "threads", None))
    load_in = getattr(args, "load_in", None)
    model, tokenizer = load_vlm(
        model_folder(args.model),
        device="cpu" if load_in else device,
        dtype=DTYPES[args.dtype] if args.dtype else default_dtype(device),
        llm_name=args.llm_name,
        encoder_name=args.vision_model_name,
        ple_device=(getattr(args, "ple_device", None) or ("auto" if device.type == "cpu" else "model")),
    )
    room, wanted = room_for_text(model), getattr(args, "max_new_tokens", None) or 0
    if wanted >= room:
        raise ValueError(
            f"--max_new_tokens {wanted}: the language model reads {room} tokens, prompt and answer together"
        )
    if load_in:
        from inference.quantized import quantize_llm

        quantize_llm(model.llm, load_in, device)
        model.to(device)
    if device.type == "cpu":
        use_onednn(model.llm)
    if getattr(args, "compile", False):
        compile_feed_forward(model)
    if os.environ.get("RANK", "0") == "0":
        layers = f", linear layers in {load_in}" if load_in else ""
        print(f"language model in {dtype_name(model)}{layers}, on {device}", file=sys.stderr)
    return model, tokenizer


def default_dtype(device: torch.device) -> torch.dtype | None:
    """bfloat16 on a GPU. On a CPU that computes in bfloat16, None: that of the model's files. float32 on others, where
    bfloat16 is emulated and several times slower.
    """
    if device.type != "cpu":
        return torch.bfloat16
    able = [name for name, present in torch.cpu.get_capabilities().items() if name.endswith("bf16") and present]
    return None if able else torch.float32


def dtype_name(model: SlideVLM) -> str:
    """The dtype that the language model computes in, as ``--dtype`` names it."""
    return next(name for name, dtype in DTYPES.items() if dtype == model.base_llm.dtype)


def room_for_text(model: SlideVLM) -> float:
    """Positions that the language model has, visual tokens, questions and answers together."""
    config = model.base_llm.config.get_text_config()
    return getattr(config, "max_position_embeddings", None) or math.inf


def set_threads(threads: int | None) -> None:
    """PyTorch's threads: the given number, else OMP_NUM_THREADS, else the cores this process may use, shared with the
    other processes of a run on this machine.
    """
    if threads is None and "OMP_NUM_THREADS" in os.environ:
        return
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // processes))


def compile_feed_forward(model: SlideVLM) -> None:
    """Compile the feed-forward blocks: most of the work, and of shapes that change with the number of rows only."""
    for name, module in model.base_llm.get_decoder().named_modules():
        if name.endswith(".mlp"):
            module.compile(dynamic=True)
