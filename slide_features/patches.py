"""The order of a slide's patch tokens, and which of them to use."""

import numpy as np


def is_in_raster_order(coords: np.ndarray) -> bool:
    """Whether (N, 2) positions are sorted by y, then x, as those of our own files are."""
    x, y = coords.T
    return bool(((y[:-1] < y[1:]) | (y[:-1] == y[1:]) & (x[:-1] <= x[1:])).all())


def raster_order(coords: np.ndarray) -> np.ndarray:
    """Return the (N,) int64 indices that sort (N, 2) positions by y, then x: the fixed order of patch tokens."""
    if is_in_raster_order(coords):
        return np.arange(len(coords))
    return np.lexsort((coords[:, 0], coords[:, 1]))


def choose_patches(num_patches: int, budget: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """Choose which patch tokens of a slide to use.

    Args:
        num_patches: how many there are.
        budget: how many to keep at most, >= 1.
        rng: draws a uniform sample without replacement; None takes evenly spaced ones, always the same.

    Returns:
        Sorted int64 indices, all of them if they fit the budget.
    """
    if budget < 1:
        raise ValueError(f"the budget of patch tokens must be at least 1, not {budget}")
    if num_patches <= budget:
        return np.arange(num_patches, dtype=np.int64)
    if rng is None:
        return (2 * np.arange(budget, dtype=np.int64) + 1) * num_patches // (2 * budget)
    return np.sort(rng.choice(num_patches, size=budget, replace=False, shuffle=False)).astype(np.int64)
