"""The Accelerator of a training run, its flags and seeds, its optimizer's groups, and ``run.json``."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import ProjectConfiguration, parse_flag_from_env, set_seed
from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    restricted_number_type,
)

from command_line import counted, refuse_idle
from deepspeed_zero import is_zero, load_whole, precision, whole_shape, zero_plugin

# Processes wait for the slowest of them, which may be writing a large model; torch's default is 10 to 30 minutes.
LONGEST_WAIT = timedelta(days=30)

BelowOne = restricted_number_type("BelowOne", float, [(">=", 0), ("<", 1)])


def add_run_arguments(parser) -> None:
    """Flags about the run itself, the same in every training stage."""
    group = parser.add_argument_group("Run")
    group.add_argument("--output_dir", required=True, help="run folder; made when missing")
    group.add_argument("--seed", type=int, default=0, help="of weights, order of records and choice of patches")
    group.add_argument(
        "--mixed_precision",
        choices=["no", "bf16", "fp16"],
        default=None,
        help="precision of activations and of a frozen LLM, fp16 is refused; default: that of `accelerate config`",
    )
    group.add_argument(
        "--save_steps", type=PositiveInt, default=500, help="steps between checkpoints; each epoch's end is one too"
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


def add_early_stopping_argument(group) -> None:
    """When a training that no longer gets better ends, the same for every stage."""
    group.add_argument(
        "--early_stopping_patience",
        type=NonNegativeInt,
        default=0,
        help="stop after so many epochs without a better --best_metric; 0: never",
    )


def add_schedule_arguments(group) -> None:
    """Flags of how the learning rate rises and falls, the same wherever something is trained with AdamW."""
    group.add_argument(
        "--warmup_ratio",
        type=ClosedUnitInterval,
        default=0.03,
        help="share of steps in which the learning rate rises",
    )
    group.add_argument(
        "--lr_scheduler_type",
        choices=["cosine", "cosine_with_restarts", "constant_with_warmup", "linear"],
        default="cosine",
        help="after the warm-up",
    )
    group.add_argument(
        "--lr_num_cycles", type=PositiveInt, default=1, help="times that cosine_with_restarts falls from the peak to 0"
    )


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
    add_schedule_arguments(group)
    group.add_argument(
        "--label_smoothing", type=BelowOne, default=0.0, help="of the training loss; validation has none"
    )
    group.add_argument(
        "--projector_ema",
        type=BelowOne,
        default=0.0,
        help="decay a step of a moving average of the projector, which is evaluated and saved; 0: none",
    )
    group.add_argument("--max_grad_norm", type=PositiveFloat, default=1.0, help="global norm to clip gradients to")
    group.add_argument(
        "--gradient_checkpointing",
        action="store_true",
        help="recompute LLM activations in the backward pass: less memory, more time",
    )
    group.add_argument(
        "--ple_device",
        choices=["model", "cpu"],
        default="model",
        help="where Gemma-3n's table of per-layer embeddings is; cpu: in its file, mapped, 4 GB less of a GPU for E2B, "
        "the same losses",
    )
    group.add_argument(
        "--random_batches",
        action="store_true",
        help="records of any length in a batch; default: records of like length, so that little of it is padding",
    )
    group.add_argument(
        "--packing",
        action="store_true",
        help="all questions about a case in one row of the LLM, behind one copy of its visual tokens; the same losses",
    )


def refuse_contradictions(args, defaults: dict[str, Any]) -> None:
    """Raise ValueError for flags of :func:`add_optimizer_arguments` of which one would make the other idle."""
    restarts = args.lr_scheduler_type == "cosine_with_restarts"
    refuse_idle(args, defaults, {"lr_num_cycles": (restarts, "--lr_scheduler_type cosine_with_restarts")})
    if args.packing and args.random_batches:
        raise ValueError("--packing puts the questions about a case together, so --random_batches cannot be; drop one")


def runs_on_cpu() -> bool:
    """Whether this process computes on the CPU, by ``accelerate``'s choice or for want of anything else.

    Accelerate must be told: several processes on a machine without a GPU would otherwise not know of each other, and
    each do all the work.
    """
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def refuse_untested_sharding() -> None:
    """Refuse what `accelerate config` can choose and our checkpoints, results or fingerprints would not survive.

    Raises:
        ValueError: FSDP1, or a language model that only the first process loads.
    """
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


ACCELERATOR_FLAGS = ("seed", "mixed_precision", "wandb_project", "tensorboard")
ZERO_FLAGS = (*ACCELERATOR_FLAGS, "max_grad_norm")  # of commands that train with DeepSpeed as well


def make_accelerator(
    *,
    output_dir: str | Path,
    seed: int,
    mixed_precision: str | None = None,
    wandb_project: str | None = None,
    tensorboard: bool = False,
    find_unused_parameters: bool = False,
    max_grad_norm: float | None = None,
) -> Accelerator:
    """Accelerator with seeds set and trackers named; :class:`run_log.RunLog` starts them. Collective: every rank.

    DeepSpeed must know ``max_grad_norm`` from the beginning, and is refused without.

    Raises:
        ValueError: float16, from the flag or from accelerate's own configuration, a sharding that is not supported, or
            DeepSpeed without a GPU, or a seed that numpy does not take.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed {seed}: give a number from 0 to {2**32 - 1}")
    refuse_untested_sharding()
    zero = zero_plugin(mixed_precision, max_grad_norm)
    trackers = [*(["wandb"] if wandb_project else []), *(["tensorboard"] if tensorboard else [])]
    accelerator = Accelerator(
        deepspeed_plugin=zero,
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
    if zero is not None and not is_zero(accelerator):
        raise ValueError("DeepSpeed: accelerate starts it on GPUs only, and finds none; use another configuration")
    if zero is not None:
        load_whole()
    if accelerator.mixed_precision == "fp16":
        raise ValueError(
            "fp16 overflows in Gemma-3n, over full and over 4-bit weights; choose bf16 or no in --mixed_precision or "
            "in `accelerate config`"
        )
    set_seed(seed)
    return accelerator


def parameter_groups(
    model: torch.nn.Module, weight_decay: float, learning_rates: dict[str, float | None] | None = None
) -> list[dict[str, Any]]:
    """Trainable parameters for AdamW, matrices with weight decay and vectors without.

    Args:
        model: of which something learns.
        weight_decay: of the matrices.
        learning_rates: peak for the parameters of a part, by the first word of their names, where it is not that of
            the optimizer; None is the optimizer's. Such groups say in ``part`` of what they are.
    """
    of_part: dict[str, list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = name.split(".")[0]
            own_rate = (learning_rates or {}).get(part) is not None
            of_part.setdefault(part if own_rate else "", []).append(parameter)
    groups = []
    for part, trainable in of_part.items():
        own = {"part": part, "lr": learning_rates[part]} if part else {}
        matrices = [parameter for parameter in trainable if parameter.ndim >= 2]
        vectors = [parameter for parameter in trainable if parameter.ndim < 2]
        groups += [{"params": matrices, "weight_decay": weight_decay, **own}] if matrices else []
        groups += [{"params": vectors, "weight_decay": 0.0, **own}] if vectors else []
    return groups


def learning_rates_now(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The rate of the next step: ``lr``, and ``lr_<part>`` of parts with one of their own."""
    rates = {"lr": optimizer.param_groups[0]["lr"]}
    for group in reversed(optimizer.param_groups):
        rates[f"lr_{group['part']}" if "part" in group else "lr"] = group["lr"]
    return rates


SCHEDULE_FLAGS = ("lr_scheduler_type", "warmup_ratio", "lr_num_cycles")


def make_scheduler(
    optimizer: torch.optim.Optimizer, num_steps: int, *, lr_scheduler_type: str, warmup_ratio: float, lr_num_cycles: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Schedule of the learning rate over ``num_steps`` optimizer steps, each part from its own peak.

    Raises:
        ValueError: cycles of a schedule that has none.
    """
    from transformers import get_scheduler

    restarts = lr_scheduler_type == "cosine_with_restarts"
    if lr_num_cycles > 1 and not restarts:
        raise ValueError(f"--lr_num_cycles {lr_num_cycles} needs --lr_scheduler_type cosine_with_restarts")
    cycles = {"num_cycles": lr_num_cycles} if restarts else {}
    num_warmup = round(warmup_ratio * num_steps)
    return get_scheduler(lr_scheduler_type, optimizer, num_warmup, num_steps, scheduler_specific_kwargs=cycles)


def forget_frozen(optimizer: torch.optim.Optimizer) -> None:
    """Take parameters that no longer learn out of the optimizer, with their state; its groups stay."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not parameter.requires_grad:
                parameter.grad = None
                optimizer.state.pop(parameter, None)
        group["params"] = [parameter for parameter in group["params"] if parameter.requires_grad]


def freeze_unused(module: torch.nn.Module, output: torch.Tensor) -> list[str]:
    """Freeze the parameters that an output does not depend on, as those of a head or pooler that is not asked for.

    They would get no gradient, for which distributed data parallel would have to search in every step.

    Args:
        module: of which something learns.
        output: what it gives, with its graph.

    Returns:
        Names of what is frozen now and was not before.

    Raises:
        ValueError: that is all that was to learn.
    """
    used, seen, functions = set(), set(), [output.grad_fn]
    while functions:
        function = functions.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        if hasattr(function, "variable"):  # where a gradient arrives
            used.add(id(function.variable))
        functions += [following for following, _ in function.next_functions]
    learning = [name for name, each in module.named_parameters() if each.requires_grad]
    unused = [name for name in learning if id(module.get_parameter(name)) not in used]
    if unused and unused == learning:
        raise ValueError(
            f"nothing of {type(module).__name__} would learn: its output depends on none of the weights that are to, "
            f"such as {unused[0]}; adapt other layers, or choose another encoder"
        )
    for name in unused:
        module.get_parameter(name).requires_grad_(False)
    return unused


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


def write_run_json(
    accelerator: Accelerator, run_dir: Path, arguments: dict[str, Any], problems: Sequence[str], **facts: Any
) -> None:
    """Write ``run.json`` (the command, its flags, versions, facts) and print facts and records left out on stderr.

    Args:
        accelerator: of the run; the main process writes.
        run_dir: where.
        arguments: the flags.
        problems: a line for each record left out.
        **facts: about the run.
    """
    import peft
    import timm
    import transformers

    if not accelerator.is_main_process:
        return
    facts = {"left_out_records": len(problems), **facts}
    versions = {module.__name__: module.__version__ for module in (torch, transformers, timm, peft)}
    run = {
        "command": sys.argv,
        "arguments": arguments,
        "git_revision": git_revision(),
        "versions": {"python": platform.python_version(), **versions},
        "num_processes": accelerator.num_processes,
        "mixed_precision": precision(accelerator),
        **facts,
    }
    temporary = run_dir / "run.json.writing"
    temporary.write_text(json.dumps(run, indent=2, default=str) + "\n")
    os.replace(temporary, run_dir / "run.json")
    for name, value in facts.items():
        print(f"{name.replace('_', ' ')}: {value}", file=sys.stderr)
    report_left_out(problems)


def trainable_parameters(model: torch.nn.Module) -> dict[str, str]:
    """For each part of the model that has parameters, ``trainable / all`` of them."""
    counts = {}
    for name, part in model.named_children():
        sizes = [(whole_shape(parameter).numel(), parameter.requires_grad) for parameter in part.parameters()]
        learning = sum(size for size, learns in sizes if learns)
        if sizes:
            counts[name] = f"{learning:,} / {sum(size for size, _ in sizes):,}"
    return counts


def end_run(accelerator: Accelerator, result: Path, message: str = "") -> None:
    """Print where the result is on stdout, and let the processes end together. Collective: call on every rank."""
    if accelerator.is_main_process:
        if message:
            print(message, file=sys.stderr)
        print(result)
    accelerator.wait_for_everyone()
    accelerator.end_training()


def report_left_out(problems: Sequence[str], shown: int = 20) -> None:
    """Print the records that were left out, the first of them by name."""
    if problems:
        print(f"{counted(len(problems), 'record')} left out:", *problems[:shown], sep="\n  ", file=sys.stderr)
        if len(problems) > shown:
            print(f"  and {len(problems) - shown} more", file=sys.stderr)
