"""Stain normalisation: the colours of a slide's tiles as if it had been stained like a reference.

    method, target = "macenko", read_stain_target("macenko", None)
    normalize = fit_stains(method, target, sample_of_tiles)     once a slide
    normalize(tile)                                             (H, W, 3) uint8 to the same, or a batch of tiles

Stains are estimated by torchstain, once over a sample of the slide's tiles and not tile by tile: a tile of hardly any
eosin keeps looking so, and neighbouring tiles keep their differences. All of it is deterministic.

Macenko et al., "A method for normalizing histology slides for quantitative analysis", ISBI 2009. Reinhard et al.,
"Color transfer between images", IEEE Computer Graphics and Applications 21(5), 2001.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

NORMALIZERS = ("none", "macenko", "reinhard")
SAMPLE_TILES = 32  # of a slide, evenly spaced
SAMPLE_PIXELS = 1_000_000  # of a sample or a target at most
LIGHT = 240  # transmitted light, and the least optical density of a stained pixel, as torchstain has them
STAINED = 0.15
LEAST_STAINED_PIXELS = 100
MOST_ALIKE = 50  # condition number of two stain vectors 2.3 degrees apart: they cannot be told apart beyond
LEAST_SPREAD = 1e-2  # of concentrations, or of a channel in Lab

Normalize = Callable[[np.ndarray], np.ndarray]


class StainError(ValueError):
    """The stains of this picture cannot be estimated; the message says why."""


def read_stain_target(method: str, image: str | Path | None) -> str:
    """Describe the stains that tiles are to have, as text that a feature file and `vlm.json` can hold.

    Args:
        method: one of `NORMALIZERS`.
        image: a picture of tissue as it should look; None for torchstain's reference, which Macenko's method alone has.

    Returns:
        The estimated numbers as JSON, empty for torchstain's reference.

    Raises:
        ValueError: if the picture is not readable or too little stained, or one is given or missing against the method.
    """
    if image is None:
        if method == "reinhard":
            raise ValueError("--stain_normalizer reinhard needs a picture of the wanted colours: give --stain_target")
        return ""
    if method == "none":
        raise ValueError(f"--stain_target {image} is given without --stain_normalizer: add macenko or reinhard")
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(image) as opened:
            picture = np.asarray(opened.convert("RGB"))
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"--stain_target {image}: does not open as an image ({error})") from error
    try:
        return json.dumps([round(float(value), 6) for value in _estimate(method, picture)])
    except StainError as error:
        raise ValueError(f"--stain_target {image}: {error}; take a picture full of tissue") from error


def fit_stains(method: str, target: str, tiles: np.ndarray) -> Normalize:
    """Estimate the stains of a slide from some of its tiles, (B, H, W, 3) uint8 RGB.

    Returns:
        What makes any (..., 3) uint8 RGB of this slide look like the target of `read_stain_target`.

    Raises:
        StainError: if the tiles are hardly stained, or with one stain alone.
    """
    found = _estimate(method, tiles)
    if method == "macenko":
        return _macenko(found, np.array(json.loads(target)) if target else _macenko_reference())
    return _reinhard(found, np.array(json.loads(target)))


def _estimate(method: str, picture: np.ndarray) -> np.ndarray:
    """Macenko: the (3, 2) stain vectors row by row, then the 2 concentrations. Reinhard: 3 means, 3 deviations."""
    pixels = picture.reshape(-1, 1, 3)
    pixels = pixels[:: -(-len(pixels) // SAMPLE_PIXELS)]
    if method == "macenko":
        from torchstain.numpy.normalizers import NumpyMacenkoNormalizer

        stained = int((_densities()[pixels] >= STAINED).all(axis=-1).sum())
        if stained < LEAST_STAINED_PIXELS:
            raise StainError(f"only {stained} of {len(pixels)} sampled pixels are stained")
        normalizer = NumpyMacenkoNormalizer()
        try:
            normalizer.fit(pixels)
        except np.linalg.LinAlgError as error:
            raise StainError(f"its stains cannot be separated ({error})") from error
        vectors, spread = normalizer.HERef, normalizer.maxCRef
        if not np.isfinite(vectors).all() or np.linalg.cond(vectors) > MOST_ALIKE:
            raise StainError("its two stains cannot be told apart")
        found = np.concatenate([vectors.ravel(), spread])
    else:
        from torchstain.numpy.normalizers import NumpyReinhardNormalizer

        normalizer = NumpyReinhardNormalizer()
        normalizer.fit(pixels)
        spread = normalizer.target_stds
        found = np.concatenate([normalizer.target_means, spread])
    if not np.isfinite(found).all() or spread.min() < LEAST_SPREAD:
        raise StainError("its colours do not vary")
    return found


def _macenko(found: np.ndarray, wanted: np.ndarray) -> Normalize:
    """What `NumpyMacenkoNormalizer.normalize` does, with the stains of the slide in place of those of each tile.

    Concentrations are linear in optical density, and so is all that is done to them: one (3, 3) matrix.
    """
    scale = np.diag(wanted[6:] / found[6:])
    matrix = wanted[:6].reshape(3, 2) @ scale @ np.linalg.pinv(found[:6].reshape(3, 2))
    densities, matrix = _densities(), matrix.T.astype(np.float32)

    def normalize(tiles: np.ndarray) -> np.ndarray:
        light = LIGHT * np.exp(-(densities[tiles] @ matrix))
        return np.minimum(light, 255).astype(np.uint8)

    return normalize


def _reinhard(found: np.ndarray, wanted: np.ndarray) -> Normalize:
    """What `NumpyReinhardNormalizer.normalize` does, with mean and deviation of the slide in place of each tile's."""
    from torchstain.numpy.utils import lab2rgb, lab_merge, lab_split, rgb2lab

    gain = (wanted[3:] / found[3:]).astype(np.float32)
    shift = (wanted[:3] - found[:3] * gain).astype(np.float32)

    def normalize(tiles: np.ndarray) -> np.ndarray:
        channels = lab_split(rgb2lab(tiles.astype(np.float32) / 255))
        lab = lab_merge(*(c * g + s for c, g, s in zip(channels, gain, shift, strict=True)))
        return (lab2rgb(lab) * 255).astype(np.uint8)

    return normalize


def _macenko_reference() -> np.ndarray:
    from torchstain.numpy.normalizers import NumpyMacenkoNormalizer

    normalizer = NumpyMacenkoNormalizer()
    return np.concatenate([normalizer.HERef.ravel(), normalizer.maxCRef])


def _densities() -> np.ndarray:
    """Optical density of each grey level, (256,) float32."""
    return -np.log((np.arange(256, dtype=np.float32) + 1) / LIGHT)
