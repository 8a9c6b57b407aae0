"""Weights and optimizer state by parameter name, whole, however the processes hold them.

One process and DDP hold every tensor whole; FSDP2 holds shards of each (``DTensor``), ZeRO-3 too (parameters that are
empty until they are gathered).
What is read here is the same in all, so one layout's checkpoint opens in another, and a result is a plain model.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from deepspeed_zero import (
    gather_with,
    gathered,
    is_in_parts,
    is_zero,
    is_zero3,
    learning_groups,
    load_state_by_parameter,
    part_weights,
    state_by_parameter,
    whole_shape,
)


def whole(tensor: Tensor) -> Tensor:
    """A tensor as every process would hold it alone. Collective where it is sharded: call on every rank."""
    if is_in_parts(tensor):
        with gathered([tensor]):
            return tensor.detach().clone()
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_on_main(accelerator: Accelerator, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Whole tensors by name, contiguous on the CPU of the main process; empty on the others. Collective.

    They are gathered one after the other, so no other process ever holds more than one of them whole.
    """
    gathered = {}
    for name, tensor in tensors:
        if accelerator.is_main_process or isinstance(tensor, DTensor) or is_in_parts(tensor):
            value = whole(tensor)
            if accelerator.is_main_process:
                gathered[name] = value.to("cpu", copy=True).contiguous()
    return gathered


def prepare(accelerator: Accelerator, model: nn.Module, *others: Any) -> tuple[Any, ...]:
    """What ``accelerator.prepare`` gives for a ``SlideVLM`` and its optimizer and loaders. Collective: every rank.

    Raises:
        ValueError: with ZeRO-3 processes would wait for each other forever.
    """
    if is_zero3(accelerator):
        model.refuse_uneven_calls()
        part_weights(accelerator, model)
    prepared = accelerator.prepare(model, *others)
    if is_zero3(accelerator):
        # The loss multiplies by the head's weights itself, chunk by chunk.
        gather_with(model, model.base_llm.get_output_embeddings().parameters())
    return prepared


def save_result(accelerator: Accelerator, model: nn.Module, folder: Path, tokenizer: Any) -> None:
    """Write a result folder, as ``SlideVLM.save`` does, from a model in any layout. Collective: call on every rank."""
    vlm = accelerator.unwrap_model(model)
    weights = whole_on_main(accelerator, vlm.result_state().items())
    if accelerator.is_main_process:
        vlm.save(folder, tokenizer, weights)
    accelerator.wait_for_everyone()


def sharded_like(value: Tensor, like: Tensor) -> Tensor:
    """The part of ``value`` that this process holds, in the device, dtype and layout of ``like``."""
    value = value.to(like.device, like.dtype)
    if not isinstance(like, DTensor):
        return value
    # Every process has read the whole value, so none is sent.
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def optimizer_state(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Tensors ``<parameter name>/<state name>``, whole, on the main process, and the settings of each parameter group.

    The settings have the parameters' names under ``params``. Collective: call on every rank.
    """
    names = {parameter: name for name, parameter in accelerator.unwrap_model(model).named_parameters()}
    learning = learning_parameters(accelerator, optimizer)
    settings = zip(optimizer.param_groups, learning, strict=True)
    groups = [group | {"params": [names[p] for p in parameters]} for group, parameters in settings]
    if is_zero(accelerator):
        return whole_on_main(accelerator, state_by_parameter(optimizer, names)), groups
    parameters = [parameter for group in learning for parameter in group]
    tensors = (
        (f"{names[parameter]}/{key}", value)
        for parameter in parameters
        for key, value in sorted(optimizer.state.get(parameter, {}).items())
    )
    return whole_on_main(accelerator, tensors), groups


def learning_parameters(accelerator: Accelerator, optimizer: torch.optim.Optimizer) -> list[list[nn.Parameter]]:
    """The model's parameters in each group of the optimizer."""
    if is_zero(accelerator):
        return learning_groups(optimizer)
    return [group["params"] for group in optimizer.param_groups]


def load_optimizer_state(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    names: Iterable[str],
    read: Callable[[str], Tensor],
    groups: list[dict[str, Any]],
) -> None:
    """Give the optimizer the state that :func:`optimizer_state` gave, when the weights are loaded. Call on every rank.

    Args:
        accelerator: of the run.
        model: as ``accelerator.prepare`` returned it.
        optimizer: likewise.
        names: of the tensors.
        read: gives one of them.
        groups: settings of each parameter group, with the names of its parameters.

    Raises:
        ValueError: the parameters that learn are others, or in other groups.
    """
    own = {name: parameter for name, parameter in accelerator.unwrap_model(model).named_parameters()}
    own_names = {parameter: name for name, parameter in own.items()}
    learning = [[own_names[p] for p in group] for group in learning_parameters(accelerator, optimizer)]
    if learning != [group["params"] for group in groups]:
        raise ValueError("other weights learned then; resume with the flags of that run")
    if is_zero(accelerator):
        load_state_by_parameter(optimizer, own, names, read)
        for group, saved in zip(optimizer.param_groups, groups, strict=True):
            group |= {key: value for key, value in saved.items() if key != "params"}
        return
    numbers = {name: number for number, name in enumerate(name for group in learning for name in group)}
    state: dict[int, dict[str, Tensor]] = {}
    for name in names:
        parameter_name, key = name.rsplit("/", 1)
        value = read(name)
        part = value if key == "step" else sharded_like(value, own[parameter_name])
        state.setdefault(numbers[parameter_name], {})[key] = part
    packed = [group | {"params": [numbers[name] for name in group["params"]]} for group in groups]
    optimizer.load_state_dict({"state": state, "param_groups": packed})


def without_unused(
    groups: list[dict[str, Any]], state_names: Iterable[str], learning: Iterable[str]
) -> tuple[list[dict[str, Any]], set[str]]:
    """Groups of an optimizer without what never learned, and the names of that.

    An earlier version gave it weights that no output depends on, such as a pooler's. They got no gradient, so it has no
    state of them, and their values are those that the model began with.

    Args:
        groups: with names of parameters under ``params``.
        state_names: ``<parameter name>/<state name>`` of all states.
        learning: names of what learns now, which stays.
    """
    kept = {name.rsplit("/", 1)[0] for name in state_names} | set(learning)
    dropped = {name for group in groups for name in group["params"]} - kept
    return [group | {"params": [name for name in group["params"] if name in kept]} for group in groups], dropped


def load_weights(own: Mapping[str, Tensor], names: Iterable[str], read: Callable[[str], Tensor]) -> None:
    """Copy weights into the tensors of the same names. Call on every rank.

    Raises:
        ValueError: names or shapes differ.
    """
    names = set(names)
    for name in sorted(names ^ set(own)):
        raise ValueError(f"other weights learned then ({name}); resume with the flags of that run")
    for name, tensor in own.items():
        value = read(name)
        if value.shape != whole_shape(tensor):
            raise ValueError(
                f"{name} was {tuple(value.shape)} and is {tuple(whole_shape(tensor))}; resume with that run's flags"
            )
        with gathered([tensor], to_change=True), torch.no_grad():
            tensor.copy_(sharded_like(value, tensor))
