"""What the files of one slide hold, and the keys that they hold it under."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from feature_containers import SUFFIXES
from slide_features.making import MAKING_FACTS, with_unsaid

FORMAT_VERSION = 1
FEATURE_SUFFIXES = tuple(SUFFIXES.values())
FEATURE_KEYS = ("features", "feats")
COORD_KEYS = ("coords", "coords_yx")
QUALITY_KEYS = ("tissue", "pen", "fold", "blur", "edge")


@dataclass(frozen=True)
class SlideFeatures:
    """Patch tokens of one slide and where they lie.

    Attributes:
        features: (N, D) float16 or float32.
        coords: (N, 2) int64, level-0 pixels, (x, y) of each tile's top-left corner.
        mpp: microns per pixel at which the tiles were read, None if the file does not say.
        encoder: name or folder of the encoder, as `encoders.load_encoder` takes it; None if unknown.
        tile_size: side of a tile in pixels at `mpp`; None if unknown.
        patch_size_level0: side of a tile in level-0 pixels; None if unknown.
        overlap: overlap of neighbouring tiles in pixels at `mpp`; None if unknown.
        min_tissue: least fraction of a tile that is tissue; None if unknown.
        encoder_fingerprint: of the encoder's weights, as `ImageEncoder.fingerprint` gives it; None if unknown.
        more_making: further `MAKING_FACTS`, where they are not as in a file that does not say them.
    """

    features: np.ndarray
    coords: np.ndarray
    mpp: float | None = None
    encoder: str | None = None
    tile_size: int | None = None
    patch_size_level0: int | None = None
    overlap: int | None = None
    min_tissue: float | None = None
    encoder_fingerprint: str | None = None
    more_making: Mapping[str, Any] = field(default_factory=dict)

    @property
    def making(self) -> dict[str, Any]:
        """Every one of `MAKING_FACTS`, None where it is unknown."""
        said = {name: getattr(self, name, None) for name in MAKING_FACTS} | dict(self.more_making)
        return with_unsaid(said)

    @property
    def um_per_px(self) -> float | None:
        """Microns of a level-0 pixel, the unit of `coords`; None if the file does not say how large its tiles are."""
        if self.mpp is None or not self.tile_size or not self.patch_size_level0:
            return None
        return float(self.mpp * self.tile_size / self.patch_size_level0)


@dataclass(frozen=True)
class SlideCoords:
    """Where the tiles of one slide lie; the content of `coords/<slide_id>.h5`.

    Attributes:
        coords: (N, 2) int64, level-0 pixels, (x, y) of each tile's top-left corner.
        name: slide_id.
        mpp: microns per pixel of the tiles.
        tile_size: side of a tile in pixels at `mpp`.
        overlap: overlap of neighbouring tiles in pixels at `mpp`.
        patch_size_level0: side of a tile in level-0 pixels.
        level0_mpp: microns per pixel of level 0.
        level0_width: width of level 0 in pixels.
        level0_height: height of level 0 in pixels.
        quality: fraction of each tile that is `tissue`, `pen`, `fold`, `blur` or `edge`, (N,) float32 each; those that
            the file records.
    """

    coords: np.ndarray
    name: str | None = None
    mpp: float | None = None
    tile_size: int | None = None
    overlap: int | None = None
    patch_size_level0: int | None = None
    level0_mpp: float | None = None
    level0_width: int | None = None
    level0_height: int | None = None
    quality: dict[str, np.ndarray] = field(default_factory=dict)


class NotFiniteError(ValueError):
    """Features that were read are not all finite; the message counts those."""


def check_arrays(path: str | Path, features: np.ndarray | None, coords: np.ndarray) -> None:
    """Raise ValueError unless positions are (N, 2) integers, N >= 1, and features, if any, (N, D) and finite."""
    if coords.ndim != 2 or coords.shape[1] != 2 or not np.issubdtype(coords.dtype, np.integer):
        raise ValueError(f"{path}: coords must be (N, 2) integers, not {coords.shape} {coords.dtype}")
    if len(coords) == 0:
        raise ValueError(f"{path}: no tiles: leave this slide out, or tile it with a lower --min_tissue")
    if features is None:
        return
    if features.ndim != 2 or features.shape[1] == 0 or len(features) != len(coords):
        raise ValueError(f"{path}: features {features.shape} do not fit {len(coords)} positions; expected (N, D)")
    if not _all_finite(features):
        bad = int((~np.isfinite(features).all(axis=1)).sum())
        raise NotFiniteError(f"{path}: {bad} of {len(features)} features are not finite: make the file again")


def _all_finite(features: np.ndarray) -> bool:
    if features.dtype != np.float16:
        return bool(np.isfinite(features).all())
    # An exponent of all ones is inf or nan: by its bits, several times as fast as numpy's half-precision arithmetic.
    exponents = np.ascontiguousarray(features).view(np.uint16) & 0x7C00
    return bool(exponents.max(initial=0) < 0x7C00)
