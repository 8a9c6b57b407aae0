"""DeepSpeed's ZeRO-2: its configuration, and its optimizer state by parameter name.

Every process holds all weights, and a part of the gradients and of the optimizer's state (Rajbhandari et al. 2020). The
engine runs the backward pass, clips and steps; loss, parameter groups, schedule and precision stay those of the run:
weights that learn are in float32, with autocast around them, and not cast to bfloat16 as in DeepSpeed's own mode.
"""

import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import DistributedType, parse_flag_from_env
from torch import Tensor

# Elements of the buffer that gradients are reduced through; DeepSpeed's own default takes 2 GB.
REDUCE_BUCKET_SIZE = 50_000_000


def is_zero(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed runs the optimizer."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def zero_plugin(mixed_precision: str | None, max_grad_norm: float | None) -> DeepSpeedPlugin | None:
    """Configuration of DeepSpeed as `accelerate config` chose it, filled in with what the run decides.

    Args:
        mixed_precision: of the run; None is that of `accelerate config`.
        max_grad_norm: global norm to clip gradients to; None where a command does not train with DeepSpeed.

    Returns:
        None where `accelerate config` did not choose DeepSpeed.

    Raises:
        ValueError: a part of DeepSpeed that is not supported, or it is not installed.
    """
    if not parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        return None
    if max_grad_norm is None:
        raise ValueError("DeepSpeed: this command does not train with it; use recipes/accelerate/ddp.yaml")
    plugin = DeepSpeedPlugin()
    config = plugin.deepspeed_config
    _refuse_unsupported(config)
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError("DeepSpeed is not installed; pip install -e '.[deepspeed]'")
    precision = mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    config["zero_optimization"].setdefault("reduce_bucket_size", REDUCE_BUCKET_SIZE)
    # The loss is a mean over the whole global batch already. DeepSpeed only counts samples by the batch size.
    config |= {"gradient_accumulation_steps": 1, "train_micro_batch_size_per_gpu": 1, "train_batch_size": "auto"}
    config |= {"gradient_clipping": max_grad_norm, "bf16": {"enabled": False}}
    # Gradients of float32 weights are reduced in float32, of whichever layers they are.
    autocast = {"enabled": precision == "bf16", "dtype": "bfloat16", "lower_precision_safe_modules": []}
    config["torch_autocast"] = autocast
    return plugin


def _refuse_unsupported(config: dict[str, Any]) -> None:
    zero = config["zero_optimization"]
    if zero.get("stage") != 2:
        raise ValueError(
            f"DeepSpeed ZeRO-{zero.get('stage')} is not supported, ZeRO-2 is (recipes/accelerate/zero2.yaml); to shard "
            "weights use recipes/accelerate/fsdp2.yaml"
        )
    for part in ("offload_optimizer", "offload_param"):
        if (zero.get(part) or {}).get("device", "none") != "none":
            raise ValueError(f"DeepSpeed's {part} is not supported; set it to none in `accelerate config`")
    for key in ("optimizer", "scheduler"):
        if key in config:
            raise ValueError(f"DeepSpeed's configuration has its own {key}, which flags choose here; take it out")


def precision(accelerator: Accelerator) -> str:
    """``bf16`` or ``no``; accelerate does not count DeepSpeed's autocast as mixed precision."""
    if is_zero(accelerator) and accelerator.deepspeed_plugin.deepspeed_config["torch_autocast"]["enabled"]:
        return "bf16"
    return accelerator.mixed_precision


def autocast(accelerator: Accelerator) -> AbstractContextManager:
    """The precision of a forward pass, for parts of a model that are called outside it."""
    if not is_zero(accelerator):
        return accelerator.autocast()
    return nullcontext() if precision(accelerator) == "no" else torch.autocast(accelerator.device.type, torch.bfloat16)


def learning_groups(optimizer: Any) -> list[list[torch.nn.Parameter]]:
    """The parameters of each group; DeepSpeed puts a flat part of them in the optimizer in their place."""
    return optimizer.optimizer.bit16_groups


def state_by_parameter(optimizer: Any, names: dict[torch.nn.Parameter, str]) -> Iterator[tuple[str, Tensor]]:
    """``<parameter name>/<state name>`` and whole tensors, one at a time. Collective: exhaust it on every rank."""
    from deepspeed.utils import safe_get_full_optimizer_state

    zero = optimizer.optimizer
    _link_state(zero)
    for flat, parameters in zip(zero.single_partition_of_fp32_groups, learning_groups(optimizer), strict=True):
        for parameter in parameters:
            for key, value in sorted(zero.state.get(flat, {}).items()):
                whole = value if key == "step" else safe_get_full_optimizer_state(parameter, key)
                yield f"{names[parameter]}/{key}", whole


def load_state_by_parameter(
    optimizer: Any, own: dict[str, torch.nn.Parameter], names: Iterable[str], read: Callable[[str], Tensor]
) -> None:
    """Take weights as they are now, and of each state that :func:`state_by_parameter` gave, the own part."""
    from deepspeed.utils import safe_set_full_optimizer_state

    zero = optimizer.optimizer
    zero.refresh_fp32_params()
    keys_of: dict[str, list[str]] = {}
    for name in names:
        parameter_name, key = name.rsplit("/", 1)
        keys_of.setdefault(parameter_name, []).append(key)
    names_of = {parameter: name for name, parameter in own.items()}
    for flat, parameters in zip(zero.single_partition_of_fp32_groups, learning_groups(optimizer), strict=True):
        with_state = [parameter for parameter in parameters if names_of[parameter] in keys_of]
        if with_state:
            first = names_of[with_state[0]]
            blank = {key: read(f"{first}/step") if key == "step" else torch.zeros_like(flat) for key in keys_of[first]}
            zero.state[flat] = blank
    _link_state(zero)
    for parameter_name, keys in keys_of.items():
        parameter = own[parameter_name]
        for key in keys:
            if key != "step":
                safe_set_full_optimizer_state(parameter, read(f"{parameter_name}/{key}").to(parameter.device), key)


def _link_state(zero: Any) -> None:
    """Let each parameter know its part of the optimizer's state.

    DeepSpeed 0.19 does so when the first group has made its first step, and the other groups have no state yet.
    """
    zero._hp_optimizer_states_linked = False
    zero._lazy_init_hp_params_optimizer_state()
