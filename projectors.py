"""Token reducers and projectors: patch tokens to visual tokens. Knows torch, nothing of ours.

A reducer is ``reducer(patch_tokens_BNE, coords_BN2, patch_mask_BN, budgets_B) -> (tokens_BKE, token_mask_BK)``; a
projector is ``projector(tokens_BKE) -> visual_tokens_BKH``. Masks are boolean, True at real tokens. Real tokens come
first in each row, in a fixed order: they stand in front of a causal language model, to which order is an input. A row
is one slide or image and may have a budget of its own, its share of what its case has; None gives each row all of it.

Shapes: B batch, N patches, K visual tokens, E patch token width, H language model width.
"""

import re

import torch
from torch import Tensor, nn
from torch.nn import functional as F

REDUCERS = ("none", "grid_pool", "perceiver")


class FixedRMSNorm(nn.Module):
    """RMSNorm without a learned scale whose output has exactly the root mean square ``output_rms``.

    Gemma-3n's own soft tokens leave through the same norm at 1.0; other language models get the root mean square of
    their text embeddings, so that visual tokens arrive at the magnitude the frozen layers expect.
    """

    def __init__(self, output_rms: float = 1.0, eps: float = 1e-6):
        super().__init__()
        self.output_rms = output_rms
        self.eps = eps

    def forward(self, tokens: Tensor) -> Tensor:
        """Normalise (..., H) over the last dimension; computed in float32, returned in the dtype of the input."""
        wide = tokens.float()
        return (self.output_rms * wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(tokens.dtype)


def build_projector(name: str, patch_width: int, llm_width: int, output_rms: float = 1.0) -> nn.Sequential:
    """Projector from patch tokens (..., E) to visual tokens (..., H), closed by :class:`FixedRMSNorm`.

    Args:
        name: ``linear``, or ``mlp{n}x_gelu`` with n >= 1 linear layers and GELU between them (LLaVA-1.5's
            ``mlp2x_gelu``, Liu et al. 2024).
        patch_width: E, the width of the encoder's patch tokens.
        llm_width: H, the hidden width of the language model.
        output_rms: root mean square of every visual token.

    Raises:
        ValueError: the name is neither form.
    """
    match = re.fullmatch(r"mlp([1-9])x_gelu", name)
    if name != "linear" and not match:
        raise ValueError(f"--projector {name!r} is unknown; use linear or mlp2x_gelu (mlp1x_gelu to mlp9x_gelu)")
    num_linear = int(match.group(1)) if match else 1
    layers: list[nn.Module] = [nn.Linear(patch_width, llm_width)]
    for _ in range(num_linear - 1):
        layers += [nn.GELU(), nn.Linear(llm_width, llm_width)]
    return nn.Sequential(*layers, FixedRMSNorm(output_rms))


def build_reducer(name: str, patch_width: int, num_visual_tokens: int) -> nn.Module:
    """Reducer from any number of patch tokens to at most ``num_visual_tokens``: one of :data:`REDUCERS`.

    Raises:
        ValueError: the name is unknown, or the budget is not positive.
    """
    if num_visual_tokens < 1:
        raise ValueError(f"--num_visual_tokens {num_visual_tokens} must be at least 1")
    if name == "none":
        return EvenlySpaced(num_visual_tokens)
    if name == "grid_pool":
        return GridPool(num_visual_tokens)
    if name == "perceiver":
        return Perceiver(patch_width, num_visual_tokens)
    raise ValueError(f"--token_reducer {name!r} is unknown; use one of {', '.join(REDUCERS)}")


class EvenlySpaced(nn.Module):
    """``none``: patch tokens as they are, and an evenly spaced choice of them where there are more than the budget.

    The random choice of training is made where the rows of a feature file are read, so that the others are not read;
    what arrives here is within the budget then, and passes unchanged.
    """

    def __init__(self, num_tokens: int):
        super().__init__()
        self.num_tokens = num_tokens

    def forward(
        self, patch_tokens: Tensor, coords: Tensor, patch_mask: Tensor, budgets: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, N, E), (B, N, 2), (B, N), (B,) to (B, min(N, K), E), (B, min(N, K))."""
        counts, budgets = patch_mask.sum(1, keepdim=True), _column(budgets, self.num_tokens, patch_mask)
        if patch_tokens.shape[1] <= self.num_tokens and not (counts > budgets).any():
            return patch_tokens, patch_mask
        patch_tokens, patch_mask = _real_first(patch_tokens, patch_mask)
        slots = torch.arange(min(self.num_tokens, patch_tokens.shape[1]), device=patch_mask.device)
        # The middle of each of K equal stretches; a row within the budget keeps its tokens one to one.
        spread = ((2 * slots + 1) * counts) // (2 * budgets)
        chosen = torch.where(counts > budgets, spread, slots.expand(len(counts), -1))
        return _gather_rows(patch_tokens, chosen.clamp(max=patch_tokens.shape[1] - 1)), slots < counts.minimum(budgets)


class GridPool(nn.Module):
    """``grid_pool``: the mean of the patch tokens in each cell of a grid over the tissue, in raster order.

    The grid of a slide has near-square cells and at most ``num_tokens`` of them; empty cells give no token. A slide
    with no more patches than the budget keeps each patch as its own token.
    """

    def __init__(self, num_tokens: int):
        super().__init__()
        self.num_tokens = num_tokens

    def forward(
        self, patch_tokens: Tensor, coords: Tensor, patch_mask: Tensor, budgets: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, N, E), (B, N, 2) integer (x, y), (B, N), (B,) to (B, K, E), (B, K)."""
        cells = self._cells(coords.long(), patch_mask, _column(budgets, self.num_tokens, patch_mask))
        cells = torch.where(patch_mask, cells, self.num_tokens)  # padding goes to a cell of its own, cut off below
        batch, _, width = patch_tokens.shape
        sums = patch_tokens.new_zeros(batch, self.num_tokens + 1, width, dtype=torch.float32)
        sums.scatter_add_(1, cells.unsqueeze(-1).expand(-1, -1, width), patch_tokens.float())
        counts = sums.new_zeros(batch, self.num_tokens + 1)
        counts.scatter_add_(1, cells, patch_mask.float())
        means = (sums / counts.clamp(min=1).unsqueeze(-1)).to(patch_tokens.dtype)
        return _real_first(means[:, :-1], counts[:, :-1] > 0)

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


class Perceiver(nn.Module):
    """``perceiver``: learned latents that read all patch tokens through cross-attention.

    The resampler of Flamingo (Alayrac et al. 2022) without its time embeddings: latents attend to patch tokens and to
    themselves, then pass a feed-forward layer, ``depth`` times. Always gives as many real tokens as its budget; a row
    with a smaller budget than others has the first of the latents.
    """

    def __init__(self, width: int, num_tokens: int, depth: int = 2):
        super().__init__()
        num_heads = next(heads for heads in range(max(1, width // 64), 0, -1) if width % heads == 0)
        self.latents = nn.Parameter(torch.randn(num_tokens, width) * width**-0.5)
        self.input_norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(_PerceiverBlock(width, num_heads) for _ in range(depth))
        self.output_norm = nn.LayerNorm(width)

    def forward(
        self, patch_tokens: Tensor, coords: Tensor, patch_mask: Tensor, budgets: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, N, E), (B, N, 2), (B, N), (B,) to (B, K, E), (B, K)."""
        patch_tokens = self.input_norm(patch_tokens.to(self.input_norm.weight.dtype))
        latents = self.latents.expand(len(patch_tokens), -1, -1)
        budgets = _column(budgets, len(self.latents), patch_mask)
        token_mask = torch.arange(len(self.latents), device=patch_mask.device) < budgets
        for block in self.blocks:
            latents = block(latents, patch_tokens, torch.cat([patch_mask, token_mask], dim=1))
        return self.output_norm(latents), token_mask


class _PerceiverBlock(nn.Module):
    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.latent_norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.attention_output = nn.Linear(width, width, bias=False)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, latents: Tensor, patch_tokens: Tensor, key_mask: Tensor) -> Tensor:
        normed = self.latent_norm(latents)
        key, value = self.key_value(torch.cat([patch_tokens, normed], dim=1)).chunk(2, dim=-1)
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (self.query(normed), key, value)
        )
        read = F.scaled_dot_product_attention(query, key, value, attn_mask=key_mask[:, None, None, :])
        latents = latents + self.attention_output(read.transpose(1, 2).flatten(-2))
        return latents + self.feed_forward(latents)


def _column(budgets: Tensor | None, num_tokens: int, patch_mask: Tensor) -> Tensor:
    """Budget of each row, (B, 1) int64, at most ``num_tokens``."""
    if budgets is None:
        return torch.full((len(patch_mask), 1), num_tokens, device=patch_mask.device)
    return budgets.unsqueeze(1).clamp(max=num_tokens)


def _real_first(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move the real tokens of each row to its front, their order kept, and cut the columns that no row needs."""
    order = torch.argsort(mask.logical_not().to(torch.int8), dim=1, stable=True)
    longest = max(1, int(mask.sum(1).max()))
    return _gather_rows(tokens, order[:, :longest]), mask.gather(1, order[:, :longest])


def _gather_rows(tokens: Tensor, rows: Tensor) -> Tensor:
    return tokens.gather(1, rows.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
