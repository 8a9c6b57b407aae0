"""Architectures of published pathology encoders that timm lacks, as models that `timm.create_model` knows.

    swin_tiny_conv_stem     CTransPath: Swin-T behind a convolutional stem (Wang et al. 2022)
    conch_vit_base          CONCH: ViT-B/16 with an attentional pooler (Lu et al. 2024)
    conch_vit_large         CONCH v1.5: ViT-L/16 with an attentional pooler (Ding et al. 2025)
    keep_vit_large          KEEP: ViT-L/16 with a projection head (Zhou et al. 2026)

Importing this module registers them. Parameters have the names of the published checkpoints, so that these load without
code of their repositories; what is not the image model (text towers, captioning) is left out when they are loaded.
"""

from functools import partial

import timm
import torch
from timm.layers import to_2tuple
from timm.models import build_model_with_cfg, register_model
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer import checkpoint_filter_fn as swin_names
from torch import Tensor, nn
from torch.nn import functional as F


class ConvStem(nn.Module):
    """Patch embedding of two strided convolutions and a linear one, in place of Swin's single 4 x 4 convolution.

    The stem of Xiao et al. 2021 ("Early convolutions help transformers see better"), as CTransPath uses it.
    """

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int],
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        norm_layer: type,
        **device,
    ):
        """Take what timm's Swin gives its patch embedding; `patch_size` must be 4."""
        super().__init__()
        if patch_size != 4:
            raise ValueError(f"the convolutional stem makes patches of 4 px, not {patch_size}")
        place = {key: device.get(key) for key in ("device", "dtype")}
        convolution = partial(nn.Conv2d, kernel_size=3, stride=2, padding=1, bias=False, **place)
        narrow, wide = embed_dim // 8, embed_dim // 4
        self.grid_size = tuple(side // patch_size for side in to_2tuple(img_size))
        self.proj = nn.Sequential(
            convolution(in_chans, narrow),
            nn.BatchNorm2d(narrow, **place),
            nn.ReLU(),
            convolution(narrow, wide),
            nn.BatchNorm2d(wide, **place),
            nn.ReLU(),
            nn.Conv2d(wide, embed_dim, kernel_size=1, **place),
        )
        self.norm = norm_layer(embed_dim, **place)

    def forward(self, pixels: Tensor) -> Tensor:
        """Turn (B, 3, H, W) into (B, H / 4, W / 4, embed_dim)."""
        return self.norm(self.proj(pixels).permute(0, 2, 3, 1))


class AttentionalPooler(nn.Module):
    """Learned queries that read all tokens through one cross-attention, without biases (CoCa, Yu et al. 2022)."""

    def __init__(self, width: int, token_width: int, num_queries: int = 1, num_heads: int = 8):
        """Read tokens of `token_width` into `num_queries` vectors of `width`."""
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.randn(num_queries, width))
        self.ln_k = nn.LayerNorm(token_width)
        self.ln_q = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_kv = nn.Linear(token_width, 2 * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Turn (B, N, token_width) into (B, num_queries, width)."""
        query = self.to_q(self.ln_q(self.query)).expand(len(tokens), -1, -1)
        key, value = self.to_kv(self.ln_k(tokens)).chunk(2, dim=-1)
        query, key, value = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (query, key, value))
        return self.to_out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(-2))


class _Tower(nn.Module):
    """A timm ViT with a head of its own: `forward_features` gives its tokens (B, N, D), `forward` one vector (B, E)."""

    trunk_name: str  # of the ViT in the published checkpoint

    @property
    def _trunk(self) -> nn.Module:
        return getattr(self, self.trunk_name)

    @property
    def patch_embed(self) -> nn.Module:
        return self._trunk.patch_embed

    @property
    def num_prefix_tokens(self) -> int:
        return self._trunk.num_prefix_tokens

    def forward_features(self, pixels: Tensor) -> Tensor:
        return self._trunk.forward_features(pixels)


class ConchTower(_Tower):
    """Image model of CONCH: what precedes the projection into the space shared with text."""

    trunk_name = "trunk"

    def __init__(self, *, trunk: str, pooled_width: int, num_classes: int = 0, **arguments):
        """Make it of timm's model `trunk` with `arguments`; `num_classes` is timm's word for a head, and must be 0."""
        super().__init__()
        self.num_classes = num_classes
        self.trunk = timm.create_model(trunk, num_classes=0, **arguments)
        self.num_features = pooled_width
        self.attn_pool_contrast = AttentionalPooler(pooled_width, self.trunk.num_features)
        self.ln_contrast = nn.LayerNorm(pooled_width)

    def forward(self, pixels: Tensor) -> Tensor:
        """Turn (B, 3, H, W) into (B, pooled_width)."""
        return self.ln_contrast(self.attn_pool_contrast(self.forward_features(pixels))[:, 0])


class KeepTower(_Tower):
    """Image model of KEEP: class token, projected into the space shared with text, of length 1."""

    trunk_name = "visual"

    def __init__(self, *, trunk: str, pooled_width: int, num_classes: int = 0, **arguments):
        """Make it of timm's model `trunk` with `arguments`; `num_classes` is timm's word for a head, and must be 0."""
        super().__init__()
        self.num_classes = num_classes
        self.visual = timm.create_model(trunk, num_classes=0, **arguments)
        self.num_features = pooled_width
        self.visual_head = nn.Sequential(
            nn.Linear(self.visual.num_features, pooled_width), nn.GELU(), nn.Linear(pooled_width, pooled_width)
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """Turn (B, 3, H, W) into (B, pooled_width)."""
        return F.normalize(self.visual_head(self.visual(pixels)), dim=-1)


@register_model
def swin_tiny_conv_stem(pretrained: bool = False, **kwargs) -> SwinTransformer:
    """CTransPath."""
    sizes = {"patch_size": 4, "window_size": 7, "embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)}
    return build_model_with_cfg(
        SwinTransformer,
        "swin_tiny_conv_stem",
        pretrained,
        pretrained_filter_fn=swin_names,
        **{**sizes, "embed_layer": ConvStem, **kwargs},
    )


@register_model
def conch_vit_base(pretrained: bool = False, **kwargs) -> ConchTower:
    """CONCH."""
    return build_model_with_cfg(
        ConchTower,
        "conch_vit_base",
        pretrained,
        pretrained_filter_fn=_conch_names,
        **{"trunk": "vit_base_patch16_224", "pooled_width": 512, "img_size": 448, **kwargs},
    )


@register_model
def conch_vit_large(pretrained: bool = False, **kwargs) -> ConchTower:
    """CONCH v1.5."""
    sizes = {"trunk": "vit_large_patch16_224", "pooled_width": 768, "img_size": 448, "init_values": 1.0}
    return build_model_with_cfg(
        ConchTower, "conch_vit_large", pretrained, pretrained_filter_fn=_conch_names, **{**sizes, **kwargs}
    )


@register_model
def keep_vit_large(pretrained: bool = False, **kwargs) -> KeepTower:
    """KEEP."""
    sizes = {"trunk": "vit_large_patch16_224", "pooled_width": 768, "init_values": 1e-5}
    return build_model_with_cfg(
        KeepTower, "keep_vit_large", pretrained, pretrained_filter_fn=_keep_names, **{**sizes, **kwargs}
    )


def _conch_names(weights: dict[str, Tensor], model: ConchTower) -> dict[str, Tensor]:
    """Weights of the image model out of CONCH's (`visual.trunk...`, with text) or CONCH v1.5's (`trunk...`)."""
    weights = weights.get("state_dict", weights)
    weights = {key.removeprefix("module.").removeprefix("visual."): value for key, value in weights.items()}
    wanted = {
        key: value for key, value in weights.items() if key.startswith(("trunk.", "attn_pool_contrast.", "ln_con"))
    }
    if "trunk.pos_embed" in wanted:
        wanted["trunk.pos_embed"] = _stretch_positions(wanted["trunk.pos_embed"], model.patch_embed.grid_size[0])
    return wanted


def _keep_names(weights: dict[str, Tensor], model: KeepTower) -> dict[str, Tensor]:
    """Weights of the image model out of KEEP's, whose layer scales were renamed from `gamma` to `weight`."""
    return {
        key.replace(".ls1.weight", ".ls1.gamma").replace(".ls2.weight", ".ls2.gamma"): value
        for key, value in weights.items()
        if key.startswith(("visual.", "visual_head."))
    }


def _stretch_positions(positions: Tensor, side: int) -> Tensor:
    """Stretch (1, 1 + n * n, D) position embeddings to a grid of `side` x `side` cells, the class token's kept.

    CONCH v1.5 stores those of 14 x 14 cells and sees 28 x 28. As its authors do it, after DINO: bicubic, by a scale
    that a tenth of a cell is added to.
    """
    stored_side = round((positions.shape[1] - 1) ** 0.5)
    if stored_side == side:
        return positions
    grid = positions[:, 1:].unflatten(1, (stored_side, stored_side)).permute(0, 3, 1, 2)
    scale = (side + 0.1) / stored_side
    stretched = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([positions[:, :1], stretched.flatten(2).transpose(1, 2)], dim=1)
