"""A step of contrastive training: the whole batch at once, or in chunks with cached gradients of the embeddings.

GradCache (Gao et al. 2021, arXiv:2101.06983): embeddings of all chunks are computed without their graphs; the loss of
the whole batch gives the gradient of each embedding; then each chunk is computed again, with its graph, and its share
of the gradient goes back through it. Memory follows the chunk, and the gradient is that of the whole batch.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

Batch = dict[str, Tensor]


class Embedded(NamedTuple):
    """What the model gives of b items: embeddings (b, D) of length 1, and the temperature's parameters ()."""

    images: Tensor
    texts: Tensor
    log_scale: Tensor
    bias: Tensor


BatchLoss = Callable[[Embedded], Tensor]


def backward_whole(accelerator: Accelerator, model: nn.Module, batch: Batch, loss_of: BatchLoss) -> Tensor:
    """Gradients of a batch's loss, computed at once. Collective: call on every rank.

    Args:
        accelerator: of the run.
        model: as ``accelerator.prepare`` returned it; gives an :class:`Embedded` of a batch.
        batch: tensors of this process, with an item a row.
        loss_of: the loss of the whole batch from this process's embeddings.

    Returns:
        () the loss, without its graph.
    """
    loss = loss_of(model(batch))
    accelerator.backward(loss)
    return loss.detach()


def backward_in_chunks(
    accelerator: Accelerator, model: nn.Module, batch: Batch, loss_of: BatchLoss, chunk_size: int
) -> Tensor:
    """The same with the memory of ``chunk_size`` items; dropout is the same in both passes over a chunk.

    The model must see items one by one: batch normalisation over a chunk is not that over a batch.
    """
    chunks = split_batch(batch, chunk_size)
    bare = accelerator.unwrap_model(model)
    device = next(bare.parameters()).device
    states, parts = [], []
    with torch.no_grad():
        for chunk in chunks:
            states.append(_random_states(device))
            parts.append(bare(chunk))
    whole = Embedded(
        torch.cat([part.images for part in parts]),
        torch.cat([part.texts for part in parts]),
        parts[0].log_scale,
        parts[0].bias,
    )
    cached = Embedded(*(value.detach().clone().requires_grad_() for value in whole))
    loss = loss_of(cached)
    accelerator.backward(loss)
    gradients = Embedded(*(torch.zeros_like(v) if v.grad is None else v.grad for v in cached))
    sizes = [len(part.images) for part in parts]
    of_images, of_texts = gradients.images.split(sizes), gradients.texts.split(sizes)
    for number, (chunk, state) in enumerate(zip(chunks, states, strict=True)):
        is_last = number == len(chunks) - 1
        # The temperature is no part of any chunk: its gradient goes back once, with the last.
        of_scalars = [gradient if is_last else torch.zeros_like(gradient) for gradient in gradients[2:]]
        _set_random_states(device, state)
        with torch.enable_grad() if is_last else accelerator.no_sync(model):
            again = model(chunk)
            shares = zip(again, (of_images[number], of_texts[number], *of_scalars), strict=True)
            accelerator.backward(sum((value * share).sum() for value, share in shares))
    return loss.detach()


def split_batch(batch: Batch, chunk_size: int) -> list[Batch]:
    """A batch in chunks of so many items at most, in order."""
    parts = {name: value.split(chunk_size) for name, value in batch.items()}
    return [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]


def _random_states(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_random_states(device: torch.device, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
