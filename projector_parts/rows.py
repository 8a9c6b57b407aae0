"""Rows of tokens of different length in one tensor: budgets, order, means of groups."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def budget_column(budgets: Tensor | None, num_tokens: int, patch_mask: Tensor) -> Tensor:
    """Budget of each row, (B, 1) int64, at most ``num_tokens``."""
    if budgets is None:
        return torch.full((len(patch_mask), 1), num_tokens, device=patch_mask.device)
    return budgets.unsqueeze(1).clamp(max=num_tokens)


def real_first(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move the real tokens of each row to its front, their order kept, and cut the columns that no row needs."""
    order = torch.argsort(mask.logical_not().to(torch.int8), dim=1, stable=True)
    longest = max(1, int(mask.sum(1).max()))
    return gather_rows(tokens, order[:, :longest]), mask.gather(1, order[:, :longest])


def gather_rows(tokens: Tensor, rows: Tensor) -> Tensor:
    """Tokens (B, N, E) at (B, K), as (B, K, E)."""
    return tokens.gather(1, rows.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def reduce_each(
    reduce_row: Callable[[Tensor, int], Tensor], tokens: Tensor, mask: Tensor, budgets: Tensor
) -> tuple[Tensor, Tensor]:
    """Reduce each row by itself, ``(n, E), budget -> (k, E)``, where it has more real tokens than its budget.

    What a row becomes cannot depend on the others or on padding then, not even in the last bit.

    Args:
        reduce_row: gets the real tokens of a row that has more than its budget.
        tokens: (B, N, E).
        mask: (B, N).
        budgets: (B, 1) int64.

    Returns:
        (B, K, E) and (B, K).
    """
    rows = []
    for row, row_mask, budget in zip(tokens, mask, budgets.flatten().tolist(), strict=True):
        real = row[row_mask]
        rows.append(reduce_row(real, budget) if len(real) > budget else real)
    masks = [torch.ones(len(row), dtype=torch.bool, device=mask.device) for row in rows]
    return pad_sequence(rows, batch_first=True), pad_sequence(masks, batch_first=True)


def mean_of_groups(tokens: Tensor, groups: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Mean token of each group and its size.

    Sums run in the order of the tokens, where ``scatter_add_`` on a GPU adds in whichever order threads come.

    Args:
        tokens: (B, N, E).
        groups: (B, N) int64 from 0 to ``num_groups``; those in ``num_groups`` itself belong to none.
        num_groups: G.

    Returns:
        (B, G, E) in the dtype of ``tokens``, summed in at least float32, zeros where a group is empty; (B, G) int64.
    """
    batch, _, width = tokens.shape
    slots = groups + torch.arange(batch, device=groups.device).unsqueeze(1) * (num_groups + 1)
    counts = torch.bincount(slots.flatten(), minlength=batch * (num_groups + 1))
    wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32)).reshape(-1, width)
    in_order = wide[torch.argsort(slots.flatten(), stable=True)]
    sums = torch.segment_reduce(in_order, "sum", lengths=counts, axis=0, initial=0)
    means = (sums / counts.clamp(min=1).unsqueeze(1)).to(tokens.dtype)
    means, counts = means.unflatten(0, (batch, num_groups + 1)), counts.unflatten(0, (batch, num_groups + 1))
    return means[:, :-1], counts[:, :-1]
