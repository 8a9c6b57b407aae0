"""The loss of a report: per supervised token of the whole global batch, in one optimizer step and in evaluation."""

import math
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from slide_vlm import IGNORED_LABEL

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class StepResult:
    """One optimizer step over all processes: mean loss per supervised token, gradient norm, and what was processed.

    ``padding_fraction`` is the share of padding among the text and patch tokens of the batches; ``num_bad`` counts
    records whose input could not be read.
    """

    loss: float
    grad_norm: float
    num_samples: int
    num_supervised_tokens: int
    padding_fraction: float
    num_bad: int


def optimizer_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: list[Batch],
    max_grad_norm: float,
) -> StepResult:
    """Accumulate the gradient of a window of micro-batches and take one optimizer step. Collective: call on every rank.

    The loss is the negative log-likelihood summed over the window on all processes, divided by the supervised tokens of
    the same; so the gradient does not depend on how records are laid out over micro-batches and processes.

    Raises:
        FloatingPointError: the gradient is not finite, and no step was taken.
    """
    totals = _global_totals(accelerator, micro_batches)
    # Distributed data parallel averages gradients over processes, whereas the sum is wanted.
    scale = accelerator.num_processes / max(1, totals.supervised)
    nll_sum = torch.zeros((), device=accelerator.device)
    for index, batch in enumerate(micro_batches):
        is_last = index == len(micro_batches) - 1
        with _gradient_sync(accelerator, model, is_last):
            nll = model(batch).sum()
            accelerator.backward(nll * scale)
        nll_sum += nll.detach()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    grad_norm = float(accelerator.clip_grad_norm_(parameters, max_grad_norm))
    if not math.isfinite(grad_norm):
        instead = "" if accelerator.mixed_precision == "no" else ", or use --mixed_precision no"
        raise FloatingPointError(
            f"the gradient norm is {grad_norm} at a loss of {_loss(accelerator, nll_sum, totals):.4g}, so no step was "
            f"taken; lower --learning_rate{instead}"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    loss = _loss(accelerator, nll_sum, totals)
    padding_fraction = 1 - totals.tokens / max(1, totals.slots)
    return StepResult(loss, grad_norm, totals.samples, totals.supervised, padding_fraction, totals.bad)


@torch.no_grad()
def evaluation_loss(accelerator: Accelerator, model: nn.Module, loader) -> float:
    """Mean negative log-likelihood per supervised token over all of ``loader``. Collective: call on every rank.

    Leaves the model in evaluation mode.
    """
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    for batch in loader:
        nll = model(batch)
        sums += torch.tensor([nll.double().sum(), len(nll)], dtype=torch.float64, device=accelerator.device)
    nll_sum, num_tokens = accelerator.reduce(sums, "sum").tolist()
    return nll_sum / max(1, num_tokens)


@dataclass(frozen=True)
class _Totals:
    supervised: int
    samples: int
    tokens: int
    slots: int
    bad: int


def _loss(accelerator: Accelerator, nll_sum: Tensor, totals: _Totals) -> float:
    """Mean over the supervised tokens of all processes. Collective."""
    return float(accelerator.reduce(nll_sum, "sum")) / max(1, totals.supervised)


def _global_totals(accelerator: Accelerator, micro_batches: list[Batch]) -> _Totals:
    counts = torch.zeros(5, dtype=torch.int64, device=accelerator.device)
    for batch in micro_batches:
        is_supervised = batch["labels"][:, 1:] != IGNORED_LABEL
        masks = [batch[name] for name in ("attention_mask", "patch_mask") if name in batch]
        num_tokens = sum(mask.sum() for mask in masks)
        num_slots = num_tokens.new_tensor(sum(mask.numel() for mask in masks))
        of_batch = [is_supervised.sum(), is_supervised.any(1).sum(), num_tokens, num_slots, batch["is_bad"].sum()]
        counts += torch.stack(of_batch).to(counts.device)
    return _Totals(*accelerator.reduce(counts, "sum").tolist())


def _gradient_sync(accelerator: Accelerator, model: nn.Module, is_last: bool):
    """Exchange gradients between processes in the last micro-batch of a window only.

    DeepSpeed exchanges them in all, and steps in the backward pass of the last.
    """
    accelerator.sync_gradients = is_last
    return torch.enable_grad() if is_last else accelerator.no_sync(model)
