"""Reducers that merge patch tokens which are alike, wherever they lie."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from projector_parts.rows import budget_column, mean_of_groups, reduce_each

KMEANS_ROUNDS = 10
NEIGHBOURS = 32  # pruned tokens that each kept one takes in
LEAST_WEIGHT = 1e-6


class KMeans(nn.Module):
    """``kmeans``: the means of clusters of patch tokens, in the order of each cluster's first patch.

    Lloyd's algorithm (Lloyd 1982) on Euclidean distances of the features, from evenly spaced patches and not from
    random ones, for at most 10 rounds. Gradients pass through the means; which cluster a patch is in has none.
    """

    def __init__(self, width: int, num_tokens: int):
        super().__init__()
        self.output_width = width
        self.num_tokens = num_tokens

    def forward(
        self, patch_tokens: Tensor, coords: Tensor, patch_mask: Tensor, budgets: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, N, E), (B, N, 2), (B, N), (B,) to (B, K, E), (B, K)."""
        budgets = budget_column(budgets, self.num_tokens, patch_mask)
        return reduce_each(_cluster_means, patch_tokens, patch_mask, budgets)


def _cluster_means(tokens: Tensor, budget: int) -> Tensor:
    clusters = cluster(tokens, budget)
    means, counts = mean_of_groups(tokens.unsqueeze(0), clusters.unsqueeze(0), budget)
    first = torch.full_like(counts[0], len(tokens))
    first.scatter_reduce_(0, clusters, torch.arange(len(tokens), device=clusters.device), "amin")
    order = torch.argsort(first)
    return means[0, order[counts[0, order] > 0]]


@torch.no_grad()
def cluster(tokens: Tensor, num_clusters: int, max_rounds: int = KMEANS_ROUNDS) -> Tensor:
    """Cluster of each token by k-means, (N,) int64, always the same for the same tokens.

    Args:
        tokens: (N, E) with N >= ``num_clusters``.
        num_clusters: clusters to begin with, at evenly spaced tokens; one that loses all its tokens keeps its place.
        max_rounds: of assigning tokens and moving centres; fewer when nothing changes any more.
    """
    tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    starts = (2 * torch.arange(num_clusters, device=tokens.device) + 1) * len(tokens) // (2 * num_clusters)
    centres, clusters = tokens[starts], None
    with torch.autocast(tokens.device.type, enabled=False):
        for _ in range(max_rounds):
            earlier, clusters = clusters, (tokens @ centres.T - centres.pow(2).sum(1) / 2).argmax(1)
            if earlier is not None and torch.equal(earlier, clusters):
                break
            means, counts = mean_of_groups(tokens.unsqueeze(0), clusters.unsqueeze(0), num_clusters)
            centres = torch.where(counts[0].unsqueeze(1) > 0, means[0], centres)
    return clusters


def distance_to_mean(tokens: Tensor) -> Tensor:
    """Score of each patch token (N, E): how far it is from the slide's mean, (N,); what is rare on the slide is far."""
    return torch.linalg.vector_norm(tokens - tokens.mean(0), dim=1)


class PruMerge(nn.Module):
    """``prumerge``: outstanding patch tokens, each with its likes merged into it, and one token for all the rest.

    After LLaVA-PruMerge (Shang et al. 2024). Tokens are kept whose scores are outliers, beyond the third quartile by
    1.5 interquartile ranges, so their number follows the slide and is often far below the budget; each takes in the 32
    pruned tokens of the most similar keys, weighted by scores; the mean of all pruned tokens, weighted alike, comes
    last. Here keys are the normalised features, since a tile's feature has no attention keys; means are true weighted
    means, so that magnitudes stay.

    Args:
        width: E.
        num_tokens: K.
        scorer: ``(n, E) -> (n,)``, at least 0. The paper's is the attention of the class token, which features of tiles
            do not have; :func:`distance_to_mean` stands in.
    """

    def __init__(self, width: int, num_tokens: int, scorer: Callable[[Tensor], Tensor] = distance_to_mean):
        super().__init__()
        self.output_width = width
        self.num_tokens = num_tokens
        self.scorer = scorer

    def forward(
        self, patch_tokens: Tensor, coords: Tensor, patch_mask: Tensor, budgets: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, N, E), (B, N, 2), (B, N), (B,) to (B, K, E), (B, K)."""
        budgets = budget_column(budgets, self.num_tokens, patch_mask)
        return reduce_each(self._prune_and_merge, patch_tokens, patch_mask, budgets)

    def _prune_and_merge(self, tokens: Tensor, budget: int) -> Tensor:
        with torch.autocast(tokens.device.type, enabled=False):
            wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
            weights = self.scorer(wide).clamp(min=LEAST_WEIGHT)
            num_kept = min(budget - 1, max(1, count_outliers(weights)))
            best_first = torch.argsort(weights, descending=True, stable=True)
            kept, pruned = best_first[:num_kept].sort().values, best_first[num_kept:].sort().values
            rest = (weights[pruned] @ wide[pruned] / weights[pruned].sum()).unsqueeze(0)
            if num_kept == 0:
                return rest.to(tokens.dtype)
            keys = F.normalize(wide.detach(), dim=1)
            likes = pruned[(keys[kept] @ keys[pruned].T).topk(min(NEIGHBOURS, len(pruned)), dim=1).indices]
            members = torch.cat([kept.unsqueeze(1), likes], dim=1)  # (k, 1 + neighbours)
            shares = weights[members] / weights[members].sum(1, keepdim=True)
            merged = torch.einsum("kn,kne->ke", shares, wide[members])
            return torch.cat([merged, rest]).to(tokens.dtype)


@torch.no_grad()
def count_outliers(scores: Tensor) -> int:
    """How many of (N,) scores lie above the third quartile by more than 1.5 interquartile ranges (Tukey 1977)."""
    low, high = torch.quantile(scores, scores.new_tensor([0.25, 0.75]))
    return int((scores > high + 1.5 * (high - low)).sum())
