"""Reducers that pool neighbours: of the tissue, of the order, of an image's patch grid."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from projector_parts.rows import budget_column, mean_of_groups, real_first, reduce_each
from projector_parts.selection import EvenlySpaced


class GridPool(nn.Module):
    """``grid_pool``: the mean of the patch tokens in each cell of a grid over the tissue, in raster order.

    The grid of a slide has near-square cells and at most ``num_tokens`` of them; empty cells give no token. A slide
    with no more patches than the budget keeps each patch as its own token.
    """

    def __init__(self, width: int, num_tokens: int):
        super().__init__()
        self.output_width = width
        self.num_tokens = num_tokens

    def forward(
        self, patch_tokens: Tensor, coords: Tensor, patch_mask: Tensor, budgets: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, N, E), (B, N, 2) integer (x, y), (B, N), (B,) to (B, K, E), (B, K)."""
        cells = self._cells(coords.long(), patch_mask, budget_column(budgets, self.num_tokens, patch_mask))
        cells = torch.where(patch_mask, cells, self.num_tokens)
        means, counts = mean_of_groups(patch_tokens, cells, self.num_tokens)
        return real_first(means, counts > 0)

    def _cells(self, coords: Tensor, patch_mask: Tensor, budgets: Tensor) -> Tensor:
        """Cell of each patch, (B, N) int64 from 0 up to the budget (B, 1), row by row over the grid."""
        far = torch.iinfo(torch.int64).max
        low = coords.masked_fill(~patch_mask.unsqueeze(-1), far).amin(1, keepdim=True)
        high = coords.masked_fill(~patch_mask.unsqueeze(-1), -far).amax(1, keepdim=True)
        extent = (high - low + 1).clamp(min=1)  # (B, 1, 2), in the units of the coordinates
        aspect = extent[..., 0].double() / extent[..., 1]
        columns = (budgets * aspect).sqrt().round().long().clamp(min=1).minimum(budgets)
        rows = budgets // columns
        offset = torch.where(patch_mask.unsqueeze(-1), coords - low, 0)
        column = offset[..., 0] * columns // extent[..., 0]
        row = offset[..., 1] * rows // extent[..., 1]
        in_grid = row * columns + column
        own_slot = patch_mask.long().cumsum(1) - 1
        fits = patch_mask.sum(1, keepdim=True) <= budgets
        return torch.where(fits, own_slot, in_grid)


class AdaptivePool(nn.Module):
    """``adaptive_pool``: the means of K equal stretches of the patch tokens in raster order.

    Adaptive average pooling over the sequence, `torch.nn.functional.adaptive_avg_pool1d`: where a slide has more
    patches than the budget, the whole budget is used, whatever the shape of the tissue.
    """

    def __init__(self, width: int, num_tokens: int):
        super().__init__()
        self.output_width = width
        self.num_tokens = num_tokens

    def forward(
        self, patch_tokens: Tensor, coords: Tensor, patch_mask: Tensor, budgets: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, N, E), (B, N, 2), (B, N), (B,) to (B, K, E), (B, K)."""
        return reduce_each(
            lambda tokens, budget: F.adaptive_avg_pool1d(tokens.T, budget).T,
            patch_tokens,
            patch_mask,
            budget_column(budgets, self.num_tokens, patch_mask),
        )


class PixelShuffle(nn.Module):
    """``pixel_shuffle``: each square of 2 x 2 neighbours of an image's patch grid side by side in one wider token.

    InternVL's space-to-depth (Chen et al. 2024): a quarter of the tokens, nothing lost. Places of a square that have no
    patch, at the border of an odd grid or where patches were left out, are zeros. Where squares outnumber the budget
    they are chosen evenly spaced.
    """

    side = 2

    def __init__(self, width: int, num_tokens: int):
        super().__init__()
        self.output_width = self.side**2 * width
        self.choice = EvenlySpaced(self.output_width, num_tokens)

    def forward(
        self, patch_tokens: Tensor, coords: Tensor, patch_mask: Tensor, budgets: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, N, E), (B, N, 2) integer (column, row) in the grid, (B, N), (B,) to (B, K, 4 E), (B, K)."""
        squares, places, counts = self._squares(coords.long(), patch_mask)
        batch, num_patches, width = patch_tokens.shape
        deep = patch_tokens.new_zeros(batch, max(1, int(counts.max())), self.side**2, width)
        rows = torch.arange(batch, device=squares.device).unsqueeze(1).expand(-1, num_patches)
        at = tuple(index[patch_mask] for index in (rows, squares, places))
        deep = deep.index_put(at, patch_tokens[patch_mask], accumulate=True)
        is_square = torch.arange(deep.shape[1], device=counts.device) < counts
        return self.choice(deep.flatten(2), coords, is_square, budgets)

    def _squares(self, coords: Tensor, patch_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Which square of its row each patch is in, in raster order, its place there, and squares (B, 1) a row."""
        coords = coords.masked_fill(~patch_mask.unsqueeze(-1), 0)
        column, row = (coords // self.side).unbind(-1)
        within = coords % self.side
        in_raster = (row * (column.max() + 1) + column).masked_fill(~patch_mask, torch.iinfo(torch.int64).max)
        in_order, order = in_raster.sort(dim=1, stable=True)
        is_new = F.pad(in_order[:, 1:] != in_order[:, :-1], (1, 0), value=False)
        squares = torch.zeros_like(order).scatter(1, order, is_new.cumsum(1))
        counts = squares.masked_fill(~patch_mask, -1).amax(1, keepdim=True) + 1
        return squares, within[..., 1] * self.side + within[..., 0], counts
