"""One optimizer step of contrastive training over all processes."""

import math
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn

from stage0_encoder.alignment_model import AlignmentModel, learns
from stage0_encoder.contrastive_loss import contrastive_loss, gather_rows, positive_pairs
from stage0_encoder.grad_cache import Batch, BatchLoss, Embedded, backward_in_chunks, backward_whole


@dataclass(frozen=True)
class ContrastiveStep:
    """One optimizer step over all processes: loss, gradient norm, inverse temperature and what was processed.

    ``mean_positives`` is how many texts of the batch belong to an image on average; ``num_bad`` counts items whose
    input could not be read.
    """

    loss: float
    grad_norm: float
    logit_scale: float
    mean_positives: float
    num_samples: int
    num_bad: int


def batch_loss(batch: Batch, kind: str) -> tuple[BatchLoss, float, int]:
    """The loss of the items of all processes that count. Collective: call on every rank.

    Returns:
        The loss as a function of this process's embeddings, itself collective; texts that belong to an image, on
        average; and how many items count.
    """
    cases, texts, is_valid = (gather_rows(batch[name]) for name in ("cases", "texts", "is_valid"))
    is_valid = is_valid.bool()
    positives = positive_pairs(cases[is_valid], texts[is_valid])

    def loss_of(embedded: Embedded) -> torch.Tensor:
        images, of_text = (gather_rows(rows)[is_valid] for rows in (embedded.images, embedded.texts))
        return contrastive_loss(images, of_text, embedded.log_scale, embedded.bias, positives, kind=kind)

    return loss_of, float(positives.sum() / max(1, len(positives))), int(is_valid.sum())


def contrastive_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    *,
    chunk_size: int | None,
    max_grad_norm: float,
    max_logit_scale: float,
) -> ContrastiveStep:
    """Take one step on a batch, at once or in chunks. Collective: call on every rank.

    Raises:
        FloatingPointError: the gradient is not finite, and no step was taken.
    """
    bare: AlignmentModel = accelerator.unwrap_model(model)
    loss_of, mean_positives, num_samples = batch_loss(batch, bare.settings.loss)
    if chunk_size is None:
        loss = backward_whole(accelerator, model, batch, loss_of)
    else:
        loss = backward_in_chunks(accelerator, model, batch, loss_of, chunk_size)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    grad_norm = float(accelerator.clip_grad_norm_(parameters, max_grad_norm))
    if not math.isfinite(grad_norm):
        raise FloatingPointError(f"the gradient norm is {grad_norm}; lower --learning_rate or use --mixed_precision no")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    bare.bound_scale(max_logit_scale)
    num_bad = int(accelerator.reduce(batch["is_bad"].sum(), "sum"))
    scale = float(bare.log_scale.detach().exp())
    return ContrastiveStep(float(loss), grad_norm, scale, mean_positives, num_samples, num_bad)


def refuse_batch_statistics(model: AlignmentModel, chunk_size: int | None) -> None:
    """Refuse chunks for an encoder that normalises over the batch: its statistics would be of the chunk.

    Raises:
        ValueError: names what would do.
    """
    if chunk_size is None:
        return
    for encoder in (model.image, model.text):
        if learns(encoder) and any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in encoder.modules()):
            raise ValueError(
                f"--chunk_size {chunk_size}: {encoder.name} has batch normalisation, which sees the chunk and not the "
                "batch; leave --chunk_size away, freeze the encoder, or take one with layer normalisation"
            )
