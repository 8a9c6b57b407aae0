"""DeepSpeed's ZeRO-2 and ZeRO-3: configuration, weights that are in parts, and optimizer state by parameter name.

With ZeRO-2 every process holds all weights, and a part of the gradients and of the optimizer's state; with ZeRO-3 only
a part of each weight, and what a module needs is gathered while it computes (Rajbhandari et al. 2020). The engine runs
the backward pass, clips and steps; loss, parameter groups, schedule and precision stay those of the run: weights that
learn are in float32, with autocast around them, and not cast to bfloat16 as in DeepSpeed's own mode.
"""

import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import DistributedType, parse_flag_from_env
from torch import Tensor, nn
from torch.nn import functional as F

# Elements of the buffer that gradients are reduced through; DeepSpeed's own default takes 2 GB.
REDUCE_BUCKET_SIZE = 50_000_000


def is_zero(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed runs the optimizer."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def is_zero3(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed also keeps the weights in parts."""
    return is_zero(accelerator) and accelerator.deepspeed_plugin.zero_stage == 3


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
    if zero.get("stage") not in (2, 3):
        raise ValueError(
            f"DeepSpeed ZeRO-{zero.get('stage')} is not supported, ZeRO-2 and ZeRO-3 are "
            "(recipes/accelerate/zero2.yaml, zero3.yaml)"
        )
    for part in ("offload_optimizer", "offload_param"):
        if (zero.get(part) or {}).get("device", "none") != "none":
            raise ValueError(f"DeepSpeed's {part} is not supported; set it to none in `accelerate config`")
    for key in ("zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_nontrainable_weights"):
        if int(zero.get(key, 0)) > (key == "zero_hpz_partition_size"):
            raise ValueError(f"DeepSpeed's {key} is not supported; take it out of its configuration")
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


def load_whole() -> None:
    """Let models be loaded whole from now on, so that they can be checked; the engine parts their weights later.

    Accelerate tells transformers of ZeRO-3, and ``from_pretrained`` would give each process a part.
    """
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def is_in_parts(weight: Tensor) -> bool:
    """Whether ZeRO-3 keeps a part of this weight on each process; unless it is in use it then has no elements."""
    return hasattr(weight, "ds_id")


def whole_shape(weight: Tensor) -> torch.Size:
    """The shape of a weight when it is whole."""
    return weight.ds_shape if is_in_parts(weight) else weight.shape


@contextmanager
def gathered(weights: Iterable[Tensor], *, to_change: bool = False) -> Iterator[None]:
    """Within, weights that ZeRO-3 keeps in parts are whole on every process. Collective if there are any.

    Args:
        weights: of any layout; those that are not in parts stay as they are.
        to_change: keep what is written into them, the same on every process; otherwise nothing may be.
    """
    in_parts = [weight for weight in weights if is_in_parts(weight)]
    if not in_parts:
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(in_parts, modifier_rank=0 if to_change else None):
        yield


def part_weights(accelerator: Accelerator, model: nn.Module) -> None:
    """Give each process its part of every weight, one weight at a time, and put that and all buffers on the device.

    The engine itself would first move the whole model there. Collective: call on every rank.
    """
    from deepspeed.runtime.zero import Init

    zero = accelerator.deepspeed_plugin.deepspeed_config["zero_optimization"]
    Init(module=model, mem_efficient_linear=zero.get("memory_efficient_linear", True))
    for buffer in model.buffers():
        buffer.data = buffer.data.to(accelerator.device)


def gather_with(module: nn.Module, weights: Iterable[nn.Parameter]) -> None:
    """Have ZeRO-3 gather these weights for as long as ``module`` computes, which reads them itself.

    For weights of another module that are used outside its own ``forward``.
    """
    from deepspeed.runtime.zero import register_external_parameter

    for weight in weights:
        if is_in_parts(weight):
            register_external_parameter(module, weight)


def whole_to_generate(accelerator: Accelerator, model: nn.Module) -> AbstractContextManager:
    """Within, each process has a prepared model whole, if ZeRO-3 has parted it, and can use it without the others.

    Collective at both ends: call on every rank.
    """
    if not is_zero3(accelerator):
        return nullcontext()
    from deepspeed.runtime.zero.stage3 import unwrap_model_for_generation

    return unwrap_model_for_generation(model)


def learning_groups(optimizer: Any) -> list[list[nn.Parameter]]:
    """The parameters of each group; DeepSpeed puts a flat part of them in the optimizer in their place."""
    zero = optimizer.optimizer
    groups: list[list[nn.Parameter]] = [[] for _ in zero.param_groups]
    for number, (_, parameters) in enumerate(_flat_groups(zero)):
        groups[zero.sub_group_to_group_id[number] if _has_parts(zero) else number] += parameters
    return groups


def _has_parts(zero: Any) -> bool:
    """Whether this is the optimizer of ZeRO-3."""
    return hasattr(zero, "fp32_partitioned_groups_flat")


def _flat_groups(zero: Any) -> list[tuple[Tensor, list[nn.Parameter]]]:
    """Each flat tensor that this process steps, and the parameters that it holds a part of.

    ZeRO-2 has one for each parameter group, ZeRO-3 several for a large one.
    """
    if _has_parts(zero):
        return list(zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True))
    return list(zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True))


def state_by_parameter(optimizer: Any, names: dict[nn.Parameter, str]) -> Iterator[tuple[str, Tensor]]:
    """``<parameter name>/<state name>`` and whole tensors, one at a time. Collective: exhaust it on every rank."""
    from deepspeed.utils import safe_get_full_optimizer_state

    zero = optimizer.optimizer
    _link_state(zero)
    for flat, parameters in _flat_groups(zero):
        for parameter in parameters:
            for key, value in sorted(zero.state.get(flat, {}).items()):
                whole = value if key == "step" else safe_get_full_optimizer_state(parameter, key)
                yield f"{names[parameter]}/{key}", whole


def load_state_by_parameter(
    optimizer: Any, own: dict[str, nn.Parameter], names: Iterable[str], read: Callable[[str], Tensor]
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
    for flat, parameters in _flat_groups(zero):
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
                value = read(f"{parameter_name}/{key}").to(parameter.device)
                safe_set_full_optimizer_state(parameter, _padded(value, parameter), key)


def _padded(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """A state as DeepSpeed cuts it: ZeRO-3's parts are of equal size, the last filled up with zeros."""
    if not is_in_parts(parameter):
        return value
    parts = torch.distributed.get_world_size(parameter.ds_process_group)
    return F.pad(value.flatten(), (0, parts * parameter.partition_numel() - value.numel()))


def _link_state(zero: Any) -> None:
    """Let each parameter know its part of the optimizer's state, with ZeRO-2.

    DeepSpeed 0.19 does so when the first group has made its first step, and the other groups have no state yet.
    """
    if not _has_parts(zero):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()
