"""Token reducers and projectors: patch tokens to visual tokens. Knows torch, nothing of ours.

A reducer is ``reducer(patch_tokens_BNE, coords_BN2, patch_mask_BN, budgets_B) -> (tokens_BKR, token_mask_BK)`` and says
its ``output_width`` R; a projector is ``projector(tokens_BKR) -> visual_tokens_BKH``, each token by itself. Masks are
boolean, True at real tokens. Real tokens come first in each row, in a fixed order: they stand in front of a causal
language model, to which order is an input. A row is one slide or image and may have a budget of its own, its share of
what its case has; None gives each row all of it. In evaluation all of them are deterministic, on a GPU too.

Position codes are ``codes(patch_tokens_BNE, coords_BN2, patch_mask_BN, um_per_unit_B) -> patch_tokens_BNE`` and stand
in front of the reducer. One reducer, ``prompt_topk``, also takes how close each patch token is to the question, (B, N).

Shapes: B batch, N patches, K visual tokens, E patch token width, R reducer's output width, H language model width.
"""

from projector_parts.attention import Perceiver, QFormer
from projector_parts.build import REDUCERS, build_reducer, choose_parts
from projector_parts.merging import KMeans, PruMerge, distance_to_mean
from projector_parts.per_token import BoundedScale, FixedRMSNorm, build_projector
from projector_parts.pooling import AdaptivePool, GridPool, PixelShuffle
from projector_parts.positions import UM_PER_IMAGE_PATCH, UNKNOWN_UM_PER_PX, PositionCodes, build_position_codes
from projector_parts.selection import PROMPT_TOPK, EvenlySpaced, PromptTopK, closeness

__all__ = [
    "PROMPT_TOPK",
    "REDUCERS",
    "UM_PER_IMAGE_PATCH",
    "UNKNOWN_UM_PER_PX",
    "AdaptivePool",
    "BoundedScale",
    "EvenlySpaced",
    "FixedRMSNorm",
    "GridPool",
    "KMeans",
    "Perceiver",
    "PixelShuffle",
    "PositionCodes",
    "PromptTopK",
    "PruMerge",
    "QFormer",
    "build_position_codes",
    "build_projector",
    "build_reducer",
    "choose_parts",
    "closeness",
    "distance_to_mean",
]
