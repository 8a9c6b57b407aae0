"""The slides or images of one case: read, and the budget of tokens shared out among them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from projectors import UNKNOWN_UM_PER_PX
from slide_features import (
    SlideFeatures,
    choose_patches,
    count_tiles,
    is_in_raster_order,
    raster_order,
    read_patches,
)
from slide_reports.inputs import check_making, um_per_px_of_file


def read_case(
    paths: Sequence[Path],
    num_patches: int,
    num_visual_tokens: int,
    rng: np.random.Generator | None = None,
    expected: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Read the patch tokens of a case's slides, those of each slide in raster order.

    Args:
        paths: feature files.
        num_patches: patch tokens to read at most, shared by the slides in proportion to their tiles.
        num_visual_tokens: of the case, shared likewise.
        rng: chooses patches at random; None evenly spaced.
        expected: how the files must have been made, as for `check_making`.

    Returns:
        ``patch_tokens`` and ``coords``, a list of (N, E) as stored and one of (N, 2) int64 with an item a slide, and
        ``visual_budgets`` (I,) int64, the share of each slide in the visual tokens, and ``um_per_px`` (I,) float32,
        microns of a level-0 pixel.

    Raises:
        ValueError: a slide without patches, or made otherwise than ``expected``; or more slides than visual tokens.
    """
    # Of a single slide nothing needs to be known beforehand, and its file is opened once.
    sizes = [count_tiles(path) for path in paths] if len(paths) > 1 else [num_patches]
    slides = []
    for path, share in zip(paths, share_budget(min(num_patches, sum(sizes)), sizes), strict=True):
        slides.append(read_patches(path, rows=lambda coords, share=share: _choose_rows(coords, share, rng)))
        check_making(path, expected or {})
    return _as_case(slides, share_budget(num_visual_tokens, sizes), [um_per_px_of_file(path) for path in paths])


def case_of_slides(slides: Sequence[SlideFeatures], num_patches: int, num_visual_tokens: int) -> dict[str, Any]:
    """The same from slides' features in memory, their patches chosen evenly spaced."""
    sizes = [len(slide.coords) for slide in slides]
    chosen = []
    for slide, share in zip(slides, share_budget(min(num_patches, sum(sizes)), sizes), strict=True):
        rows = _choose_rows(slide.coords, share, None)
        chosen.append((slide.features[rows], slide.coords[rows]))
    return _as_case(chosen, share_budget(num_visual_tokens, sizes), [slide.um_per_px for slide in slides])


def read_images(
    paths: Sequence[Path],
    transform: Any,
    num_patches: int,
    num_visual_tokens: int,
    rng: np.random.Generator | None = None,
    patches_per_image: int | None = None,
) -> dict[str, Any]:
    """Read the images of a case, which share its budgets equally; the rest as for `read_case`.

    Args:
        paths: image files.
        transform: ``PIL.Image -> (3, height, width)`` tensor.
        num_patches: patch tokens to keep at most.
        num_visual_tokens: of the case.
        rng: chooses patches at random; None evenly spaced.
        patches_per_image: patch tokens that the encoder gives of an image; None where that is unknown.

    Returns:
        ``pixel_values`` (I, 3, height, width) float32, ``visual_budgets`` (I,) int64, and where it is known how many
        patch tokens there will be, ``chosen_patches``, a list of (N,) int64 with an item an image.
    """
    pixel_values = torch.stack([read_image(path, transform) for path in paths])
    budgets = share_budget(num_visual_tokens, [1] * len(paths))
    images = {"pixel_values": pixel_values, "visual_budgets": torch.tensor(budgets)}
    if patches_per_image:
        sizes = [patches_per_image] * len(paths)
        shares = share_budget(min(num_patches, sum(sizes)), sizes)
        rows = [choose_patches(patches_per_image, share, rng) for share in shares]
        images["chosen_patches"] = [torch.from_numpy(of_image) for of_image in rows]
    return images


def read_image(path: Path, transform: Any) -> Tensor:
    """Open an image file and apply the encoder's transform: (3, height, width) float32.

    Raises:
        ValueError: the file does not open as an image.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return transform(image.convert("RGB"))
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: does not open as an image ({error}); replace it or leave the record out") from error


def share_budget(budget: int, sizes: Sequence[int]) -> list[int]:
    """Share out a budget in proportion to sizes, by largest remainders, at least 1 to each: whole numbers that add up.

    Tiles of a model's slides are of one size, so by their number it is shared by tissue area. No share is larger than
    its size where the budget is not larger than all sizes together.

    Raises:
        ValueError: the budget is too small to give each something.
    """
    if budget < len(sizes):
        raise ValueError(f"a case of {len(sizes)} slides or images needs as many tokens; raise --num_visual_tokens")
    if len(sizes) == 1:
        return [budget]
    quotients, remainders = np.divmod(budget * np.asarray(sizes, dtype=np.int64), sum(sizes))
    left_over = budget - int(quotients.sum())
    quotients[np.argsort(-remainders, kind="stable")[:left_over]] += 1
    for empty in np.nonzero(quotients == 0)[0]:
        quotients[np.argmax(quotients)] -= 1
        quotients[empty] = 1
    return quotients.tolist()


def _choose_rows(coords: np.ndarray, budget: int, rng: np.random.Generator | None) -> np.ndarray:
    """Sorted rows of a slide's patches to use: evenly spaced ones are so in raster order, whatever that of the file."""
    chosen = choose_patches(len(coords), budget, rng)
    return chosen if is_in_raster_order(coords) else np.sort(raster_order(coords)[chosen])


def _as_case(
    slides: Sequence[tuple[np.ndarray, np.ndarray]], budgets: list[int], um_per_px: list[float | None]
) -> dict[str, Any]:
    case = {"patch_tokens": [], "coords": [], "visual_budgets": torch.tensor(budgets)}
    case["um_per_px"] = torch.tensor([um or UNKNOWN_UM_PER_PX for um in um_per_px])
    for features, coords in slides:
        if not is_in_raster_order(coords):
            order = raster_order(coords)
            features, coords = features[order], coords[order]
        case["patch_tokens"].append(torch.from_numpy(features))
        case["coords"].append(torch.from_numpy(coords.astype(np.int64, copy=False)))
    return case
