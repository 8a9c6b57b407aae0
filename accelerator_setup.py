"""The Accelerator of a training run, its flags and seeds, its optimizer's groups, and ``run.json``."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import ProjectConfiguration, parse_flag_from_env, set_seed
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

# Processes wait for the slowest of them, which may be writing a large model; torch's default is 10 to 30 minutes.
LONGEST_WAIT = timedelta(days=30)


def add_run_arguments(parser) -> None:
    """Flags about the run itself, the same in every training stage."""
    group = parser.add_argument_group("Run")
    group.add_argument("--output_dir", required=True, help="run folder; made when missing")
    group.add_argument("--seed", type=int, default=0, help="of weights, order of records and choice of patches")
    group.add_argument(
        "--mixed_precision",
        choices=["no", "bf16"],
        default=None,
        help="precision of activations and of a frozen LLM; default: that of `accelerate config`",
    )
    group.add_argument(
        "--save_steps", type=int, default=500, help="steps between checkpoints; each epoch's end is one too"
    )
    group.add_argument("--keep_checkpoints", type=PositiveInt, default=2, help="newest checkpoints to keep")
    group.add_argument("--resume_from_checkpoint", default=None, help="`latest` or a checkpoints/step_<n> folder")
    group.add_argument("--overwrite", action="store_true", help="delete the run in --output_dir and start anew")
    group.add_argument(
        "--num_workers",
        type=NonNegativeInt,
        default=2,
        help="reader processes per GPU; 0: none",
    )
    group.add_argument("--wandb_project", default=None, help="log to this Weights & Biases project; off unless given")
    group.add_argument("--tensorboard", action="store_true", help="log to <output_dir>/tensorboard")


def add_optimizer_arguments(parser, *, learning_rate: float, num_epochs: int) -> None:
    """Flags of optimizer and schedule, with a stage's own defaults."""
    group = parser.add_argument_group("Optimization")
    group.add_argument("--batch_size", type=PositiveInt, default=8, help="records per process and forward pass")
    group.add_argument(
        "--gradient_accumulation_steps", type=PositiveInt, default=1, help="forward passes per optimizer step"
    )
    group.add_argument("--learning_rate", type=PositiveFloat, default=learning_rate, help="peak of the schedule")
    group.add_argument("--num_epochs", type=PositiveInt, default=num_epochs, help="passes over the training records")
    group.add_argument("--weight_decay", type=NonNegativeFloat, default=0.0, help="of AdamW; never on biases and norms")
    group.add_argument(
        "--warmup_ratio",
        type=ClosedUnitInterval,
        default=0.03,
        help="share of steps in which the learning rate rises",
    )
    group.add_argument(
        "--lr_scheduler_type",
        choices=["cosine", "constant_with_warmup", "linear"],
        default="cosine",
        help="after the warm-up",
    )
    group.add_argument("--max_grad_norm", type=PositiveFloat, default=1.0, help="global norm to clip gradients to")
    group.add_argument(
        "--gradient_checkpointing",
        action="store_true",
        help="recompute LLM activations in the backward pass: less memory, more time",
    )


def runs_on_cpu() -> bool:
    """Whether this process computes on the CPU, by ``accelerate``'s choice or for want of anything else.

    Accelerate must be told: several processes on a machine without a GPU would otherwise not know of each other, and
    each do all the work.
    """
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def refuse_untested_sharding() -> None:
    """Refuse what `accelerate config` can choose and our checkpoints, results or fingerprints would not survive.

    Raises:
        ValueError: DeepSpeed, FSDP1, or a language model that only the first process loads.
    """
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError("DeepSpeed: its checkpoints are not supported; use recipes/accelerate/fsdp2.yaml")
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise ValueError(
                "FSDP1: its flattened weights are not supported; set fsdp_version: 2 in `accelerate config`"
            )
        if parse_flag_from_env("FSDP_CPU_RAM_EFFICIENT_LOADING"):
            raise ValueError(
                "fsdp_cpu_ram_efficient_loading: every process checks the language model, so each must load it; "
                "set it to false in `accelerate config`"
            )


def make_accelerator(
    *,
    output_dir: str | Path,
    seed: int,
    mixed_precision: str | None = None,
    wandb: bool = False,
    tensorboard: bool = False,
    find_unused_parameters: bool = False,
) -> Accelerator:
    """Accelerator with seeds set and trackers named; :class:`run_log.RunLog` starts them. Collective: every rank.

    Raises:
        ValueError: float16, from the flag or from accelerate's own configuration, or a sharding that is not supported.
    """
    refuse_untested_sharding()
    trackers = [*(["wandb"] if wandb else []), *(["tensorboard"] if tensorboard else [])]
    accelerator = Accelerator(
        cpu=runs_on_cpu(),
        mixed_precision=mixed_precision,
        log_with=trackers or None,
        project_config=ProjectConfiguration(str(output_dir), logging_dir=str(Path(output_dir) / "tensorboard")),
        dataloader_config=DataLoaderConfiguration(even_batches=False),
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=find_unused_parameters),
            InitProcessGroupKwargs(timeout=LONGEST_WAIT),
        ],
        step_scheduler_with_optimizer=False,
    )
    if accelerator.mixed_precision == "fp16":
        raise ValueError("fp16 overflows in Gemma-3n; choose bf16 or no in --mixed_precision or in `accelerate config`")
    set_seed(seed)
    return accelerator


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters for AdamW, matrices with weight decay and vectors without."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trainable if parameter.ndim >= 2]
    vectors = [parameter for parameter in trainable if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def forget_frozen(optimizer: torch.optim.Optimizer) -> None:
    """Take parameters that no longer learn out of the optimizer, with their state; its groups stay."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not parameter.requires_grad:
                parameter.grad = None
                optimizer.state.pop(parameter, None)
        group["params"] = [parameter for parameter in group["params"] if parameter.requires_grad]


def windows(batches: Iterable, size: int) -> Iterator[list]:
    """Consecutive groups of ``size`` micro-batches: one optimizer step each."""
    window = []
    for batch in batches:
        window.append(batch)
        if len(window) == size:
            yield window
            window = []


def git_revision() -> str | None:
    """Revision of this checkout, with ``-dirty`` where it differs, or None outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def write_run_json(accelerator: Accelerator, run_dir: Path, arguments: dict[str, Any], **facts: Any) -> None:
    """Write ``run.json`` (the command, its flags, versions, and the facts given) and print the facts on stderr."""
    import peft
    import timm
    import transformers

    if not accelerator.is_main_process:
        return
    versions = {module.__name__: module.__version__ for module in (torch, transformers, timm, peft)}
    run = {
        "command": sys.argv,
        "arguments": arguments,
        "git_revision": git_revision(),
        "versions": {"python": platform.python_version(), **versions},
        "num_processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        **facts,
    }
    temporary = run_dir / "run.json.writing"
    temporary.write_text(json.dumps(run, indent=2, default=str) + "\n")
    os.replace(temporary, run_dir / "run.json")
    for name, value in facts.items():
        print(f"{name.replace('_', ' ')}: {value}", file=sys.stderr)


def trainable_parameters(model: torch.nn.Module) -> dict[str, str]:
    """For each part of the model, ``trainable / all`` parameters."""
    counts = {}
    for name, part in model.named_children():
        parameters = list(part.parameters())
        learning = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        counts[name] = f"{learning:,} / {sum(parameter.numel() for parameter in parameters):,}"
    return counts


def report_left_out(accelerator: Accelerator, problems: list[str], shown: int = 20) -> None:
    """Print the records that were left out, on the main process."""
    if accelerator.is_main_process and problems:
        print(f"{len(problems)} records left out:", *problems[:shown], sep="\n  ", file=sys.stderr)
        if len(problems) > shown:
            print(f"  and {len(problems) - shown} more", file=sys.stderr)
