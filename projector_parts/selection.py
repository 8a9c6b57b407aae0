"""Reducers that keep some patch tokens as they are."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from projector_parts.rows import budget_column, gather_rows, real_first

PROMPT_TOPK = "prompt_topk"
PATCHES_AT_ONCE = 2048  # of each row, projected to be compared with the question


class EvenlySpaced(nn.Module):
    """``none``: patch tokens as they are, and an evenly spaced choice of them where there are more than the budget.

    The random choice of training is made where the rows of a feature file are read, so that the others are not read;
    what arrives here is within the budget then, and passes unchanged.
    """

    def __init__(self, width: int, num_tokens: int):
        super().__init__()
        self.output_width = width
        self.num_tokens = num_tokens

    def forward(
        self, patch_tokens: Tensor, coords: Tensor, patch_mask: Tensor, budgets: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, N, E), (B, N, 2), (B, N), (B,) to (B, min(N, K), E), (B, min(N, K))."""
        counts, budgets = patch_mask.sum(1, keepdim=True), budget_column(budgets, self.num_tokens, patch_mask)
        if patch_tokens.shape[1] <= self.num_tokens and not (counts > budgets).any():
            return patch_tokens, patch_mask
        patch_tokens, patch_mask = real_first(patch_tokens, patch_mask)
        slots = torch.arange(min(self.num_tokens, patch_tokens.shape[1]), device=patch_mask.device)
        # The middle of each of K equal stretches; a row within the budget keeps its tokens one to one.
        spread = ((2 * slots + 1) * counts) // (2 * budgets)
        chosen = torch.where(counts > budgets, spread, slots.expand(len(counts), -1))
        return gather_rows(patch_tokens, chosen.clamp(max=patch_tokens.shape[1] - 1)), slots < counts.minimum(budgets)


class PromptTopK(nn.Module):
    """``prompt_topk``: the patch tokens that are closest to the question, in their own order.

    The prompt-based top-K of a WSI-LLaVA (github.com/Desperadodo/UCL_2025_FYP, after Liang et al. 2025), with
    :func:`closeness`. The choice itself has no gradient; the tokens that are chosen have.
    """

    def __init__(self, width: int, num_tokens: int):
        super().__init__()
        self.output_width = width
        self.num_tokens = num_tokens

    def forward(
        self,
        patch_tokens: Tensor,
        coords: Tensor,
        patch_mask: Tensor,
        budgets: Tensor | None = None,
        *,
        closeness: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """(B, N, E), (B, N, 2), (B, N), (B,) and closeness (B, N) to (B, K, E), (B, K)."""
        budgets = budget_column(budgets, self.num_tokens, patch_mask)
        best_first = torch.argsort(closeness.masked_fill(~patch_mask, -torch.inf), dim=1, descending=True, stable=True)
        return real_first(patch_tokens, patch_mask & (torch.argsort(best_first, dim=1) < budgets))


@torch.no_grad()
def closeness(projector: nn.Module, patch_tokens: Tensor, questions: Tensor) -> Tensor:
    """Cosine between each projected patch token and the question, both vectors of the language model's embeddings.

    A cosine, since the magnitudes of the two are not comparable. Memory follows a part of the patch tokens; those that
    are chosen are projected again, with gradients.

    Args:
        projector: (..., R) to (..., H).
        patch_tokens: (B, N, R).
        questions: (B, H), the mean embedding of the question's tokens.

    Returns:
        (B, N) float32, from -1 to 1.
    """
    with torch.autocast(patch_tokens.device.type, enabled=False):
        parts = [
            F.cosine_similarity(projector(part).float(), questions.float().unsqueeze(1), dim=-1)
            for part in patch_tokens.split(PATCHES_AT_ONCE, dim=1)
        ]
    return torch.cat(parts, dim=1)
