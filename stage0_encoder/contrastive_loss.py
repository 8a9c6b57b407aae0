"""Contrastive losses of paired embeddings: softmax and sigmoid, with one positive or several, over all processes.

    loss = contrastive_loss(images_BD, texts_BD, log_scale, bias, positives_BB, kind="unicl")

Row i of the images belongs to row i of the texts; `positives` says which texts of the batch belong to which images. All
is symmetric: every loss is the mean of image-to-text and text-to-image, or is the same both ways.

Shapes: B items of the whole batch, D width of an embedding.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

KINDS = ("clip", "siglip", "multi_siglip", "unicl", "mil_nce")
WITH_MANY_POSITIVES = ("multi_siglip", "unicl", "mil_nce")
SIGMOID = ("siglip", "multi_siglip")
# Where the temperature begins: 1 / 0.07 of CLIP (Radford et al. 2021); 10 and a bias of -10 of SigLIP.
FIRST_LOG_SCALE = {kind: math.log(10) if kind in SIGMOID else math.log(1 / 0.07) for kind in KINDS}
FIRST_SIGMOID_BIAS = -10.0


def contrastive_loss(
    images: Tensor, texts: Tensor, log_scale: Tensor, bias: Tensor, positives: Tensor, *, kind: str
) -> Tensor:
    """The loss of a whole batch, computed in float32 (float64 stays so), whatever autocast says.

    Args:
        images: (B, D), of length 1.
        texts: (B, D), of length 1.
        log_scale: (), natural logarithm of the inverse temperature.
        bias: (), added to the logits of the sigmoid losses; the others do not change with it.
        positives: (B, B) boolean, row image, column text, true on the diagonal.
        kind: `clip` (softmax, Radford et al. 2021, arXiv:2103.00020) and `siglip` (sigmoid, Zhai et al. 2023,
            arXiv:2303.15343) know the diagonal only. With several positives, `unicl` is the mean of their log
            probabilities (Yang et al. 2022, arXiv:2204.03610; "L_out" of SupCon, arXiv:2004.11362), `mil_nce` the log
            of the sum of their probabilities (Miech et al. 2020, arXiv:1912.06430, each direction with its own
            denominator), `multi_siglip` the sigmoid loss with a label of 1 for each.

    Returns:
        () the mean over items; 0 of no items.

    Raises:
        ValueError: another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown contrastive loss {kind}, expected one of {', '.join(KINDS)}")
    with torch.autocast(images.device.type, enabled=False):
        images, texts, log_scale, bias = (_full(value) for value in (images, texts, log_scale, bias))
        logits = log_scale.exp() * images @ texts.T
        if kind not in WITH_MANY_POSITIVES:
            positives = torch.eye(len(images), dtype=torch.bool, device=images.device)
        if kind in SIGMOID:
            return _sigmoid_loss(logits + bias, positives)
        one_way = _mean_of_logs if kind != "mil_nce" else _log_of_sum
        return (one_way(logits, positives) + one_way(logits.T, positives.T)) / 2 + 0 * bias


def positive_pairs(cases: Tensor, texts: Tensor) -> Tensor:
    """Which items of a batch are positives: those of one case, and those of one text; (B, B) boolean from (B,) each."""
    return (cases[:, None] == cases[None]) | (texts[:, None] == texts[None])


def gather_rows(rows: Tensor) -> Tensor:
    """Rows of all processes in order of rank, with a gradient. Collective: call on every rank.

    The gradient that comes back to a process is the sum of what all processes have for its rows. When each computes the
    loss of the whole batch, and gradients of weights are averaged as DDP does, weights get the gradient of that loss.

    Args:
        rows: (b, …), where b may differ between processes.

    Returns:
        (B, …), B the sum of all b.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    return _GatherRows.apply(rows)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        """Pad to the longest, gather, and cut the padding away."""
        sizes = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(dist.get_world_size())]
        dist.all_gather(sizes, torch.tensor([len(rows)], device=rows.device))
        ctx.sizes = [int(size) for size in sizes]
        padded = rows.new_zeros((max(ctx.sizes), *rows.shape[1:]))
        padded[: len(rows)] = rows
        gathered = [torch.empty_like(padded) for _ in ctx.sizes]
        dist.all_gather(gathered, padded)
        return torch.cat([part[:size] for part, size in zip(gathered, ctx.sizes, strict=True)])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        """Sum over the processes, and this process's rows of it."""
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient.split(ctx.sizes)[dist.get_rank()]


def _mean_of_logs(logits: Tensor, positives: Tensor) -> Tensor:
    log_probabilities = logits - logits.logsumexp(dim=1, keepdim=True)
    of_positives = log_probabilities.masked_fill(~positives, 0).sum(dim=1) / positives.sum(dim=1).clamp(min=1)
    return -of_positives.sum() / max(1, len(logits))


def _log_of_sum(logits: Tensor, positives: Tensor) -> Tensor:
    of_positives = logits.masked_fill(~positives, -torch.inf).logsumexp(dim=1)
    return (logits.logsumexp(dim=1) - of_positives).sum() / max(1, len(logits))


def _sigmoid_loss(logits: Tensor, positives: Tensor) -> Tensor:
    return -F.logsigmoid(torch.where(positives, logits, -logits)).sum() / max(1, len(logits))


def _full(value: Tensor) -> Tensor:
    return value if value.dtype == torch.float64 else value.float()
