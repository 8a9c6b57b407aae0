"""Reducers by name, and which of them go with which projector."""

from torch import nn

from projector_parts.attention import Perceiver, QFormer
from projector_parts.merging import KMeans, PruMerge
from projector_parts.pooling import AdaptivePool, GridPool, PixelShuffle
from projector_parts.selection import PROMPT_TOPK, EvenlySpaced, PromptTopK

# What needs patch tokens alone; prompt_topk asks for the question as well, pixel_shuffle for the grid of an image.
REDUCERS = ("none", "grid_pool", "adaptive_pool", "kmeans", "prumerge", "perceiver", "qformer")
PIXEL_SHUFFLE = "pixel_shuffle"
_CLASSES = {
    "none": EvenlySpaced,
    "grid_pool": GridPool,
    "adaptive_pool": AdaptivePool,
    "kmeans": KMeans,
    "prumerge": PruMerge,
    "perceiver": Perceiver,
    "qformer": QFormer,
    PROMPT_TOPK: PromptTopK,
    PIXEL_SHUFFLE: PixelShuffle,
}
# Projectors that change the number of tokens are a reducer and what stands behind it: (projector, reducer).
_PAIRS = {
    PIXEL_SHUFFLE: ("ln_mlp2x_gelu", PIXEL_SHUFFLE),
    "perceiver": ("linear", "perceiver"),
    "qformer": ("linear", "qformer"),
}


def choose_parts(projector: str, token_reducer: str, patch_grid: tuple[int, int] | None) -> tuple[str, str]:
    """The names for :func:`build_projector` and :func:`build_reducer` that two flags mean together.

    Args:
        projector: a projector's name, or ``pixel_shuffle``, ``perceiver`` or ``qformer``, which reduce by themselves.
        token_reducer: a reducer's name; ``sample`` is another word for ``none``.
        patch_grid: (rows, columns) of an image's patch tokens; None for slides, and for encoders without a grid.

    Raises:
        ValueError: two ways to reduce, or ``pixel_shuffle`` without a grid.
    """
    reducer = "none" if token_reducer == "sample" else token_reducer
    if projector in _PAIRS:
        wanted = projector
        projector, own_reducer = _PAIRS[projector]
        if reducer not in ("none", own_reducer):
            raise ValueError(f"--projector {wanted} reduces patch tokens itself; drop --token_reducer {token_reducer}")
        reducer = own_reducer
    if reducer == PIXEL_SHUFFLE and patch_grid is None:
        raise ValueError(
            f"{PIXEL_SHUFFLE} needs the whole patch grid of an image, which slides and some encoders do not have; "
            "use --projector mlp2x_gelu, with --token_reducer grid_pool to join neighbouring tiles"
        )
    return projector, reducer


def build_reducer(name: str, patch_width: int, num_visual_tokens: int) -> nn.Module:
    """Reducer from any number of patch tokens to at most ``num_visual_tokens``, of its own ``output_width``.

    Raises:
        ValueError: the name is unknown, or the budget is not positive.
    """
    if num_visual_tokens < 1:
        raise ValueError(f"--num_visual_tokens {num_visual_tokens} must be at least 1")
    if name not in _CLASSES:
        raise ValueError(f"--token_reducer {name!r} is unknown; use one of {', '.join(_CLASSES)}")
    return _CLASSES[name](patch_width, num_visual_tokens)
