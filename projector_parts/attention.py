"""Reducers that learn: queries of their own read all patch tokens through attention."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from projector_parts.rows import budget_column

HEAD_WIDTH = 64
QFORMER_WIDTH = 768


class Perceiver(nn.Module):
    """``perceiver``: learned latents that read all patch tokens through cross-attention.

    The resampler of Flamingo (Alayrac et al. 2022) without its time embeddings: latents attend to patch tokens and to
    themselves, then pass a feed-forward layer, ``depth`` times. Always gives as many real tokens as its budget; a row
    with a smaller budget than others has the first of the latents.
    """

    def __init__(self, width: int, num_tokens: int, depth: int = 2):
        super().__init__()
        self.output_width = width
        self.latents = nn.Parameter(torch.randn(num_tokens, width) * width**-0.5)
        self.input_norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(_PerceiverBlock(width) for _ in range(depth))
        self.output_norm = nn.LayerNorm(width)

    def forward(
        self, patch_tokens: Tensor, coords: Tensor, patch_mask: Tensor, budgets: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, N, E), (B, N, 2), (B, N), (B,) to (B, K, E), (B, K)."""
        patch_tokens = self.input_norm(patch_tokens.to(self.input_norm.weight.dtype))
        latents = self.latents.expand(len(patch_tokens), -1, -1)
        budgets = budget_column(budgets, len(self.latents), patch_mask)
        token_mask = torch.arange(len(self.latents), device=patch_mask.device) < budgets
        for block in self.blocks:
            latents = block(latents, patch_tokens, torch.cat([patch_mask, token_mask], dim=1))
        return self.output_norm(latents), token_mask


class QFormer(nn.Module):
    """``qformer``: learned queries that attend to one another and, in every second block, to all patch tokens.

    After the Q-Former of BLIP-2 (Li et al. 2023), without its text branch: queries are 768 wide whatever the patch
    tokens are (narrower where those are), and see patch tokens through cross-attention alone. Norms stand in front of
    each part. As many real tokens as its budget; a row with a smaller one has the first of the queries.
    """

    def __init__(self, width: int, num_tokens: int, depth: int = 4):
        super().__init__()
        self.output_width = min(width, QFORMER_WIDTH)
        self.queries = nn.Parameter(torch.randn(num_tokens, self.output_width) * self.output_width**-0.5)
        self.input_norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(_QFormerBlock(self.output_width, width, reads=i % 2 == 0) for i in range(depth))
        self.output_norm = nn.LayerNorm(self.output_width)

    def forward(
        self, patch_tokens: Tensor, coords: Tensor, patch_mask: Tensor, budgets: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, N, E), (B, N, 2), (B, N), (B,) to (B, K, min(E, 768)), (B, K)."""
        patch_tokens = self.input_norm(patch_tokens.to(self.input_norm.weight.dtype))
        queries = self.queries.expand(len(patch_tokens), -1, -1)
        budgets = budget_column(budgets, len(self.queries), patch_mask)
        token_mask = torch.arange(len(self.queries), device=patch_mask.device) < budgets
        for block in self.blocks:
            queries = block(queries, token_mask, patch_tokens, patch_mask)
        return self.output_norm(queries), token_mask


class _PerceiverBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.latent_norm = nn.LayerNorm(width)
        self.attention = _Attention(width, width)
        self.feed_forward = _feed_forward(width)

    def forward(self, latents: Tensor, patch_tokens: Tensor, key_mask: Tensor) -> Tensor:
        normed = self.latent_norm(latents)
        latents = latents + self.attention(normed, torch.cat([patch_tokens, normed], dim=1), key_mask)
        return latents + self.feed_forward(latents)


class _QFormerBlock(nn.Module):
    def __init__(self, width: int, patch_width: int, *, reads: bool):
        super().__init__()
        self.query_norm = nn.LayerNorm(width)
        self.self_attention = _Attention(width, width)
        self.reading_norm = nn.LayerNorm(width) if reads else None
        self.cross_attention = _Attention(width, patch_width) if reads else None
        self.feed_forward = _feed_forward(width)

    def forward(self, queries: Tensor, token_mask: Tensor, patch_tokens: Tensor, patch_mask: Tensor) -> Tensor:
        normed = self.query_norm(queries)
        queries = queries + self.self_attention(normed, normed, token_mask)
        if self.cross_attention is not None:
            queries = queries + self.cross_attention(self.reading_norm(queries), patch_tokens, patch_mask)
        return queries + self.feed_forward(queries)


class _Attention(nn.Module):
    """Multi-head attention of queries (B, K, W) to sources (B, N, S) with a mask (B, N), without biases."""

    def __init__(self, width: int, source_width: int):
        super().__init__()
        self.num_heads = next(heads for heads in range(max(1, width // HEAD_WIDTH), 0, -1) if width % heads == 0)
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(source_width, 2 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, queries: Tensor, sources: Tensor, source_mask: Tensor) -> Tensor:
        key, value = self.key_value(sources).chunk(2, dim=-1)
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (self.query(queries), key, value)
        )
        read = F.scaled_dot_product_attention(query, key, value, attn_mask=source_mask[:, None, None, :])
        return self.output(read.transpose(1, 2).flatten(-2))


def _feed_forward(width: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
