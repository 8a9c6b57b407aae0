"""Negative log-likelihood of tokens behind a language model's head, a few rows of logits at a time.

One row of logits of a vocabulary of 262,400 is 1 MB in float32, its gradient another. Where the head does not learn,
each token's gradient with respect to its hidden state is known as soon as its logits are, but for the factor that comes
from above. So it is worked out in the forward pass, of a chunk of rows whose logits are then gone, and the backward
pass is a multiplication. The same products of matrices as the plain way, nothing computed twice, two chunks in memory.

Shapes: S tokens, H language model width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from deepspeed_zero import is_in_parts

ROWS_PER_CHUNK = 128  # of logits in memory at one time: 134 MB in float32 at a vocabulary of 262,400


def token_nll(
    hidden_SH: Tensor,
    targets_S: Tensor,
    head: nn.Module,
    *,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy of each token, (S,) float32 (float64 if all else is); S may be 0.

    Args:
        hidden_SH: last hidden states at the positions that predict the targets.
        targets_S: token ids, int64.
        head: from hidden states to logits; its product is computed in the dtype of its weights or of autocast.
        softcap: logits are ``tanh(logits / softcap) * softcap``, as in Gemma; None leaves them.
        label_smoothing: share of the target that is spread evenly over the vocabulary (Szegedy et al. 2016).
    """
    if _is_plain_and_frozen(head):
        return _FrozenHeadNLL.apply(
            hidden_SH, targets_S, head.weight, head.bias, softcap, label_smoothing, _product_dtype(head, hidden_SH)
        )

    def nll_of(hidden: Tensor, targets: Tensor) -> Tensor:
        hidden = hidden.to(_product_dtype(head, hidden))
        # Processes have different numbers of chunks, and with ZeRO-3 must call the same modules equally often.
        logits = F.linear(hidden, head.weight, head.bias) if is_in_parts(head.weight) else head(hidden)
        logits = capped(_at_least_float32(logits), softcap)
        return F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)

    if len(targets_S) <= ROWS_PER_CHUNK:
        return nll_of(hidden_SH, targets_S)
    chunks = zip(hidden_SH.split(ROWS_PER_CHUNK), targets_S.split(ROWS_PER_CHUNK), strict=True)
    return torch.cat([checkpoint(nll_of, *chunk, use_reentrant=False) for chunk in chunks])


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Logits with the final softcap applied, if the model has one."""
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _is_plain_and_frozen(head: nn.Module) -> bool:
    """Whether the head is one matrix that does not learn and lies here whole: not adapted, quantised or sharded."""
    if type(head) is not nn.Linear or any(parameter.requires_grad for parameter in head.parameters()):
        return False
    return type(head.weight) is nn.Parameter and head.weight.shape == (head.out_features, head.in_features)


def _product_dtype(head: nn.Module, hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype


class _FrozenHeadNLL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        softcap: float | None,
        label_smoothing: float,
        dtype: torch.dtype,
    ) -> Tensor:
        weight = weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        exact = torch.promote_types(dtype, torch.float32)
        nll = torch.empty(len(targets), dtype=exact, device=hidden.device)
        gradient = torch.empty_like(hidden, dtype=exact) if ctx.needs_input_grad[0] else None
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(targets), ROWS_PER_CHUNK):
                rows = slice(start, start + ROWS_PER_CHUNK)
                logits = _at_least_float32(F.linear(hidden[rows].to(dtype), weight, bias))
                nll[rows], by_logit = _nll_and_gradient(
                    logits, targets[rows], softcap, label_smoothing, with_gradient=gradient is not None
                )
                del logits
                if gradient is not None:
                    gradient[rows] = by_logit.to(dtype) @ weight
                del by_logit
        ctx.save_for_backward(gradient)
        ctx.hidden_dtype = hidden.dtype
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factors: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * factors.unsqueeze(1)).to(ctx.hidden_dtype), *(None,) * 6


def _nll_and_gradient(
    logits: Tensor, targets: Tensor, softcap: float | None, label_smoothing: float, *, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy (S,) and its gradient by the logits before the softcap (S, V), in two matrices; spoils ``logits``.

    With p the softmax, t the target's distribution and c the softcap, the gradient is (p - t) (1 - (capped / c)^2).
    """
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    largest = logits.amax(1, keepdim=True)
    chances = (logits - largest).exp_()
    total = chances.sum(1, keepdim=True)
    log_total = (total.log() + largest).squeeze(1)
    at_target = targets.unsqueeze(1)
    nll = log_total - logits.gather(1, at_target).squeeze(1)
    if label_smoothing:
        nll = (1 - label_smoothing) * nll + label_smoothing * (log_total - logits.mean(1))
    if not with_gradient:
        return nll, None
    gradient = chances.div_(total)
    if label_smoothing:
        gradient.sub_(label_smoothing / logits.shape[1])
    gradient.scatter_add_(1, at_target, torch.full_like(at_target, label_smoothing - 1, dtype=gradient.dtype))
    if softcap is not None:
        gradient.mul_(logits.div_(softcap).square_().neg_().add_(1))
    return nll, gradient
