"""Measures of evidence: does it point at a lesion whose place is known, and does the model miss the tiles it names?

Shapes: N tiles of a slide that the model read.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from inference.evidence import Evidence, batch_with_report
from slide_features import SlideCoords
from slide_vlm import SlideVLM
from stage0_tiling.artefacts import tile_fractions
from stage0_tiling.tissue import Grid, TissueMask
from stage0_tiling.user_masks import read_mask

MASK_SIDE = 2048  # pixels of the longer side in which a lesion's mask is laid on the tiles
STEPS = np.linspace(0, 1, 11)  # shares of the tiles that are deleted or inserted


def lesion_shares(mask: Path, slide: SlideCoords, coords: np.ndarray) -> np.ndarray:
    """What fraction of each tile is lesion, (N,) float32.

    Args:
        mask: GeoJSON or PNG file, as `stage0_tiling.user_masks` takes it.
        slide: what the slide's feature file says of its size.
        coords: (N, 2) level-0 pixels of top-left corners.

    Raises:
        ValueError: the feature file does not say how large slide and tiles are, or the mask does not fit.
    """
    width, height, side = slide.level0_width, slide.level0_height, slide.patch_size_level0
    if not (width and height and side):
        raise ValueError(f"{mask.stem}: its feature file does not say how large slide and tiles are; encode it anew")
    scale = min(1.0, MASK_SIDE / max(width, height))
    shape = max(1, round(height * scale)), max(1, round(width * scale))
    lesion = TissueMask(read_mask(mask, shape, width, height), np.empty(0), shape[1] / width, shape[0] / height)
    return tile_fractions(lesion.mask, lesion, coords, Grid(side, side, side, side))


def top_tile(values: np.ndarray) -> int:
    """The tile of most evidence; of several equal ones the first."""
    return int(np.argmax(values))


def auroc(values: np.ndarray, is_lesion: np.ndarray) -> float:
    """Probability that a tile of the lesion has more evidence than another tile, ties half (Mann-Whitney)."""
    inside, outside = values[is_lesion], values[~is_lesion]
    wins = (inside[:, None] > outside).mean() + 0.5 * (inside[:, None] == outside).mean()
    return float(wins)


@torch.no_grad()
def leave_one_out(
    model: SlideVLM, tokenizer: Any, sample: dict[str, Any], report: str, at_once: int = 16
) -> np.ndarray:
    """How much each line loses when one tile is not read, (R, N) float32: what a map of evidence should foretell.

    One forward pass a tile, ``at_once`` of them together; rows as in :class:`inference.evidence.Evidence`.
    """
    num_tiles = len(sample["coords"][0])
    everything = torch.arange(num_tiles)
    kept = [everything, *(everything[everything != tile] for tile in range(num_tiles))]
    sums = []
    for start in range(0, len(kept), at_once):
        variants = [with_tiles(sample, rows) for rows in kept[start : start + at_once]]
        batch, spans = batch_with_report(model, tokenizer, variants, report)
        log_probs = -model(batch).reshape(len(variants), -1)
        sums.append(torch.stack([log_probs[:, span.tokens.to(log_probs.device)].sum(1) for span in spans]))
    sums = torch.cat(sums, dim=1)
    return (sums[:, :1] - sums[:, 1:]).cpu().numpy()


@torch.no_grad()
def deletion_curves(
    model: SlideVLM, tokenizer: Any, sample: dict[str, Any], report: str, row: int, orders: list[np.ndarray]
) -> np.ndarray:
    """Mean log-probability of a line's tokens while tiles are taken away from the slide (Petsiuk et al. 2018).

    A tile that is taken away is not read: the model sees a slide with fewer tiles, which it knows from training.
    Insertion, tile after tile from the first on, is the deletion of the reverse order read backwards.

    Args:
        model: in evaluation mode.
        tokenizer: of its language model.
        sample: a prompt without an answer about one slide.
        report: the text that is read behind it.
        row: 0 for the whole report, i for its i-th line.
        orders: each (N,), tiles as they are taken; the last one always stays.

    Returns:
        (orders, 11) float64, natural logarithm per token, after 0, 10, ..., 100 % of the tiles but one were taken.
    """
    curves = []
    for order in orders:
        taken = [round(share * (len(order) - 1)) for share in STEPS]
        variants = [with_tiles(sample, torch.from_numpy(np.sort(order[number:]))) for number in taken]
        batch, spans = batch_with_report(model, tokenizer, variants, report)
        log_probs = -model(batch).reshape(len(variants), -1)
        curves.append(log_probs[:, spans[row].tokens.to(log_probs.device)].mean(1).double().cpu().numpy())
    return np.stack(curves)


def with_tiles(sample: dict[str, Any], rows: torch.Tensor) -> dict[str, Any]:
    """The sample of one slide with some of its tiles."""
    return sample | {"patch_tokens": [sample["patch_tokens"][0][rows]], "coords": [sample["coords"][0][rows]]}


def area(curve: np.ndarray) -> float:
    """Area under a curve over the shares from 0 to 1, by trapezoids."""
    return float(np.trapezoid(curve, STEPS))


def unlike_the_rest(sample: dict[str, Any], evidence: Evidence) -> np.ndarray:
    """How far each patch token is from the slide's mean, the same for every line, (R, N): a map that asks no model.

    What a model adds to finding the odd tile out is what its evidence is better by than this.
    """
    patches = sample["patch_tokens"][0].float()
    distances = torch.linalg.vector_norm(patches - patches.mean(0), dim=1).numpy()
    return np.repeat(distances[None], len(evidence.rows), axis=0)
