"""LongNet: a transformer over all tiles of a slide whose attention is dilated, as the slide encoder of Prov-GigaPath.

    longnet = LongNet()                                              gigapath_slide_enc12l768d, 86 M parameters
    longnet(features_BND, cells_BN2)                                 (B, 1, E): one slide token
    longnet(features_BND, cells_BN2, tile_mask_BN, tokens="all")     (B, N, E): every tile, seen in its slide

Dilated attention (Ding et al. 2023, arXiv:2307.02486) costs time linear in the number of tiles: each of its branches
cuts the sequence into segments and keeps every r-th token of a segment, other ones for other heads; the branches are
merged by the denominators of their softmax. Parameters have the names of the published checkpoint (Xu et al. 2024,
https://github.com/prov-gigapath/prov-gigapath, Apache-2.0). Attention runs in PyTorch's own kernels, on CPU and GPU.

Shapes: B slides, N tiles, D width of the features, E width, H heads, C width of a head, S segments, L length of one.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

# 2 ** linspace(10, 20, 5), rounded down: from 1024 tokens to all tiles of a slide of 262144 px in tiles of 256 px
GIGAPATH_SEGMENTS = (1024, 5792, 32768, 185363, 1048576)
GIGAPATH_DILATIONS = (1, 2, 4, 8, 16)
TOKENS = ("slide", "layers", "all")


class LongNet(nn.Module):
    """Transformer with dilated attention over the tiles of a slide; defaults are Prov-GigaPath's.

    The order of the tiles is an input: segments and dilation follow it. Give them in one fixed order, such as
    `slide_features.raster_order`.

    Attributes:
        name: `longnet`, or what `slide_encoders.load_slide_encoder` opened.
        input_width: D, the width of the features it takes.
        width: E, the width of what it gives.
        arguments: what the constructor was called with, as plain data.
    """

    def __init__(
        self,
        input_width: int = 1536,
        width: int = 768,
        *,
        depth: int = 12,
        num_heads: int = 16,
        feed_forward_width: int | None = None,
        segment_lengths: tuple[int, ...] = GIGAPATH_SEGMENTS,
        dilations: tuple[int, ...] = GIGAPATH_DILATIONS,
        pooling: str = "class",
        dropout: float = 0.25,
        drop_path: float = 0.1,
    ):
        """Make it with random weights.

        Args:
            input_width: D.
            width: E, a multiple of 4 and of `num_heads`.
            depth: layers.
            num_heads: H.
            feed_forward_width: hidden width of the feed-forward layers; None means 4 E.
            segment_lengths: tokens of a segment, for each branch.
            dilations: every how many-th token of a segment is kept, for each branch; one of them is 1.
            pooling: `class` token or `mean` of the tiles makes the slide token.
            dropout: of embeddings, attention outputs and feed-forward outputs, while training.
            drop_path: greatest rate at which a slide skips a layer, while training; it grows from 0 with depth.

        Raises:
            ValueError: if these do not fit each other.
        """
        super().__init__()
        if width % 4 or width % num_heads:
            raise ValueError(f"LongNet of width {width}: expected a multiple of 4 and of its {num_heads} heads")
        if len(segment_lengths) != len(dilations) or 1 not in dilations:
            raise ValueError(f"LongNet: dilations {dilations} must hold 1 and be as many as segments {segment_lengths}")
        if pooling not in ("class", "mean"):
            raise ValueError(f"LongNet: unknown pooling {pooling}, expected class or mean")
        self.arguments = {
            "input_width": input_width,
            "width": width,
            "depth": depth,
            "num_heads": num_heads,
            "feed_forward_width": feed_forward_width,
            "segment_lengths": list(segment_lengths),
            "dilations": list(dilations),
            "pooling": pooling,
            "dropout": dropout,
            "drop_path": drop_path,
        }
        self.name = "longnet"
        self.input_width = input_width
        self.width = width
        self.pooling = pooling
        self.patch_embed = nn.ModuleDict({"proj": nn.Linear(input_width, width)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.dropout = nn.Dropout(dropout)
        layers = (
            _Layer(
                width,
                num_heads,
                feed_forward_width or 4 * width,
                tuple(zip(segment_lengths, dilations, strict=True)),
                dropout,
                drop_path * layer / max(1, depth - 1),
            )
            for layer in range(depth)
        )
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(layers), "layer_norm": nn.LayerNorm(width)})
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self._initialise()

    def forward(
        self, features: Tensor, cells: Tensor, tile_mask: Tensor | None = None, *, tokens: str = "slide"
    ) -> Tensor:
        """Encode slides; what becomes of one does not depend on the others in the batch nor on its padding.

        Args:
            features: (B, N, D), tiles in a fixed order.
            cells: (B, N, 2) integers, (x, y) of each tile in a grid of tiles (`slide_encoders.tile_cells`).
            tile_mask: (B, N) boolean, True at real tiles; None means all are real.
            tokens: `slide`: (B, 1, E). `layers`: (B, depth + 1, E), a slide token from the embedding and from each
                layer. `all`: (B, N, E), the tiles after the last layer, zero where they are padding.
        """
        if tokens not in TOKENS:
            raise ValueError(f"LongNet gives tokens {', '.join(TOKENS)}, not {tokens}")
        features = features.to(self.cls_token.dtype)
        if tile_mask is None:
            return self._encode(features, cells, tokens)
        rows = [
            self._encode(features[row, mask][None], cells[row, mask][None], tokens)[0]
            for row, mask in enumerate(tile_mask)
        ]
        if tokens != "all":
            return torch.stack(rows)
        padded = rows[0].new_zeros(*tile_mask.shape, self.width)
        padded[tile_mask] = torch.cat(rows)
        return padded

    def _encode(self, features_BND: Tensor, cells_BN2: Tensor, tokens: str) -> Tensor:
        if features_BND.shape[1] == 0:
            raise ValueError("a slide without tiles cannot be encoded")
        tiles = self.patch_embed["proj"](features_BND)
        tiles = tiles + sincos_positions(cells_BN2, self.width).to(tiles)
        hidden = self.dropout(torch.cat([self.cls_token.expand(len(tiles), -1, -1).to(tiles), tiles], dim=1))
        states = [hidden]
        for layer in self.encoder["layers"]:
            hidden = layer(hidden)
            if tokens == "layers":
                states.append(hidden)
        if tokens == "layers":  # as published: without the norm that closes the last layer
            return torch.stack([self._slide_token(state) for state in states], dim=1)
        hidden = self.encoder["layer_norm"](hidden)
        return self.norm(hidden[:, 1:]) if tokens == "all" else self._slide_token(hidden)[:, None]

    def _slide_token(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden[:, 0] if self.pooling == "class" else hidden[:, 1:].mean(dim=1))

    def _initialise(self) -> None:
        nn.init.normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)


class _Layer(nn.Module):
    """Sub-LayerNorm transformer layer (Wang et al. 2022, arXiv:2210.06423)."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        feed_forward_width: int,
        branches: tuple[tuple[int, int], ...],
        dropout: float,
        drop_path: float,
    ):
        super().__init__()
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.self_attn = _DilatedAttention(width, num_heads, branches)
        self.final_layer_norm = nn.LayerNorm(width)
        self.ffn = _FeedForward(width, feed_forward_width)
        self.dropout = nn.Dropout(dropout)
        self.drop_path = StochasticDepth(drop_path, mode="row")

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.drop_path(self.dropout(self.self_attn(self.self_attn_layer_norm(hidden))))
        return hidden + self.drop_path(self.dropout(self.ffn(self.final_layer_norm(hidden))))


class _DilatedAttention(nn.Module):
    def __init__(self, width: int, num_heads: int, branches: tuple[tuple[int, int], ...]):
        super().__init__()
        self.num_heads = num_heads
        self.branches = branches
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))
        self.inner_attn_ln = nn.LayerNorm(width)

    def forward(self, hidden: Tensor) -> Tensor:
        query, key, value = (
            project(hidden).unflatten(-1, (self.num_heads, -1)) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = dilated_attention(query, key, value, self.branches)
        return self.out_proj(self.inner_attn_ln(mixed.flatten(-2)))


class _FeedForward(nn.Module):
    def __init__(self, width: int, hidden_width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden_width)
        self.ffn_layernorm = nn.LayerNorm(hidden_width)
        self.fc2 = nn.Linear(hidden_width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.fc1(hidden)
        return self.fc2(self.ffn_layernorm(F.gelu(hidden.float()).to(hidden.dtype)))


def dilated_attention(query: Tensor, key: Tensor, value: Tensor, branches: tuple[tuple[int, int], ...]) -> Tensor:
    """Dilated self-attention (Ding et al. 2023, section 3.2), without a mask.

    As in the code that the published weights were trained with, a sequence that does not fill its last segment is
    filled up with keys and values of zero, which take part in the softmax, and no gradient flows through the weights
    that merge the branches.

    Args:
        query: (B, N, H, C).
        key: (B, N, H, C).
        value: (B, N, H, C).
        branches: (length of a segment in tokens, dilation) of each branch; a dilation of 1 must be among them.

    Returns:
        (B, N, H, C) in the dtype of `query`. Memory is linear in N on CPU and GPU.
    """
    mixed, total = None, None
    for segment_length, dilation in branches:
        out, log_sum = _branch(query, key, value, segment_length, dilation)
        if mixed is None:
            mixed, total = out, log_sum
            continue
        both = torch.logaddexp(total, log_sum)
        mixed = mixed * (total - both).exp()[..., None] + out * (log_sum - both).exp()[..., None]
        total = both
    return mixed.to(query.dtype)


def _branch(query: Tensor, key: Tensor, value: Tensor, segment_length: int, dilation: int) -> tuple[Tensor, Tensor]:
    """One branch: (B, N, H, C) float32 and log softmax denominators (B, N, H), -inf where a head skips a token."""
    batch, num_tokens, num_heads, head_width = query.shape
    segment_length = min(segment_length, num_tokens)
    num_segments = -(-num_tokens // segment_length)
    rows_per_segment = -(-segment_length // dilation)
    heads = _heads_of_offsets(num_heads, dilation)

    def thin_out(tokens: Tensor) -> Tensor:
        """(B, N, H, C) to (B S, H, L / r, C): of the heads, each keeps the tokens at its own offset."""
        tokens = F.pad(tokens, (0, 0, 0, 0, 0, num_segments * segment_length - num_tokens))
        tokens = tokens.unflatten(1, (num_segments, segment_length)).flatten(0, 1)
        tokens = F.pad(tokens, (0, 0, 0, 0, 0, rows_per_segment * dilation - segment_length))
        kept = [tokens[:, offset::dilation, span] for offset, span in enumerate(heads)]
        return torch.cat(kept, dim=2).transpose(1, 2)

    out, log_sum = attend(thin_out(query), thin_out(key), thin_out(value))
    full = out.new_zeros(batch * num_segments, rows_per_segment * dilation, num_heads, head_width, dtype=torch.float32)
    full_log_sum = log_sum.new_full(full.shape[:-1], -torch.inf)
    for offset, span in enumerate(heads):
        full[:, offset::dilation, span] = out[:, span].transpose(1, 2).float()
        full_log_sum[:, offset::dilation, span] = log_sum[:, span].transpose(1, 2)

    def restore(tokens: Tensor) -> Tensor:
        tokens = tokens[:, :segment_length].unflatten(0, (batch, num_segments))
        return tokens.flatten(1, 2)[:, :num_tokens]

    return restore(full), restore(full_log_sum)


def _heads_of_offsets(num_heads: int, dilation: int) -> list[slice]:
    """Which heads keep the tokens at offset 0, 1, ...: equal groups, the last ones smaller or absent."""
    per_offset = -(-num_heads // dilation)
    return [slice(first, min(first + per_offset, num_heads)) for first in range(0, num_heads, per_offset)]


def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention with the log of its denominators, which `scaled_dot_product_attention` keeps to itself.

    Args:
        query: (B, H, L, C).
        key: (B, H, L, C).
        value: (B, H, L, C).

    Returns:
        (B, H, L, C), and (B, H, L) float32 without a gradient. The kernels are those of
        `scaled_dot_product_attention`, which hold no (L, L) matrix; devices other than CPU and CUDA get the formula.
    """
    kernels = torch.ops.aten
    if query.device.type == "cpu":
        out, log_sum = kernels._scaled_dot_product_flash_attention_for_cpu(query, key, value)
    elif query.device.type == "cuda" and query.shape[-1] % 8 == 0:
        out, log_sum, *_ = kernels._scaled_dot_product_efficient_attention(query, key, value, None, True)
    else:
        return attend_plainly(query, key, value)
    return out, log_sum[..., : query.shape[2]].detach()


def attend_plainly(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """What `attend` computes, written out; it holds the (L, L) matrix."""
    scores = (query @ key.transpose(-1, -2)).float() * query.shape[-1] ** -0.5
    return scores.softmax(dim=-1).to(value.dtype) @ value, scores.logsumexp(dim=-1).detach()


def sincos_positions(cells: Tensor, width: int) -> Tensor:
    """Sine-cosine embedding of places in a grid, (..., E) float32 from (..., 2) integers (x, y).

    Half of the channels encode y, half x, each with sines, then cosines of E / 4 frequencies falling from 1 towards
    1 / 10000 (MAE, He et al. 2022). Where the original looks positions up in a table of 1000 x 1000 cells, and
    overflows beyond it, they are computed, so that a slide may have any size.
    """
    frequencies = 10000 ** -(torch.arange(width // 4, dtype=torch.float64, device=cells.device) / (width // 4))
    angles = cells.flip(-1).double()[..., None] * frequencies  # (..., 2, E / 4), y first
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2).float()
