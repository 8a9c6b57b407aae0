"""Write the files of one slide."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from feature_containers import StoredArray, attributes_path, format_of, write_arrays, write_tensor
from slide_features.atomic import atomic_path
from slide_features.contents import FORMAT_VERSION, QUALITY_KEYS, check_arrays
from slide_features.making import worth_saying

NOMINAL_MAGNIFICATIONS = (1.25, 2.5, 5, 10, 20, 40, 60, 80)


def write_slide_features(
    path: str | Path,
    features: np.ndarray,
    coords: np.ndarray,
    *,
    name: str,
    encoder: str,
    mpp: float,
    tile_size: int,
    overlap: int,
    patch_size_level0: int,
    min_tissue: float | None = None,
    encoder_fingerprint: str | None = None,
    level0_mpp: float | None = None,
    level0_width: int | None = None,
    level0_height: int | None = None,
    more_making: Mapping[str, Any] | None = None,
) -> None:
    """Write the feature file of one slide, atomically.

    Args:
        path: the file to make, `.h5`, `.zarr.zip` or `.pt`; an older one is replaced. Of `.pt`, which is a bare tensor,
            the attributes go to `<path>.json` and the positions are those of `../coords/<slide_id>.h5`.
        features: (N, D) float16 or float32, N >= 1, finite.
        coords: (N, 2) integers, level-0 pixels, (x, y).
        name: slide_id.
        encoder: name or folder of the encoder.
        mpp: microns per pixel of the tiles.
        tile_size: side of a tile in pixels at `mpp`.
        overlap: overlap of neighbouring tiles in pixels at `mpp`.
        patch_size_level0: side of a tile in level-0 pixels.
        min_tissue: least fraction of a tile that is tissue.
        encoder_fingerprint: of the encoder's weights.
        level0_mpp: microns per pixel of level 0.
        level0_width: width of level 0 in pixels.
        level0_height: height of level 0 in pixels.
        more_making: further `MAKING_FACTS`.

    Raises:
        ValueError: if shapes or types do not fit, or a feature is not finite.
    """
    features, coords = np.asarray(features), np.asarray(coords)
    if features.dtype not in (np.float16, np.float32):
        raise ValueError(f"{path}: features must be float16 or float32, not {features.dtype}")
    check_arrays(path, features, coords)
    about = {
        **_root_attributes(mpp, tile_size, level0_mpp),
        **worth_saying({"overlap": overlap, "min_tissue": min_tissue, **(more_making or {})}),
        "encoder": encoder,
    }
    if encoder_fingerprint is not None:
        about["encoder_fingerprint"] = encoder_fingerprint
    path = Path(path)
    if format_of(path) == "pt":
        with atomic_path(attributes_path(path)) as partial:
            partial.write_text(json.dumps(about, indent=1))
        with atomic_path(path) as partial:
            write_tensor(partial, features)
        return
    sizes = {"level0_width": level0_width, "level0_height": level0_height}
    arrays = {
        "features": StoredArray(features, min(len(features), 256), {"name": name, "encoder": encoder}),
        "coords": _stored_coords(coords, name, mpp, tile_size, overlap, patch_size_level0, level0_mpp, sizes),
    }
    with atomic_path(path) as partial:
        write_arrays(partial, format_of(path), arrays, about)


def write_slide_coords(
    path: str | Path,
    coords: np.ndarray,
    *,
    name: str,
    mpp: float,
    tile_size: int,
    overlap: int,
    patch_size_level0: int,
    level0_mpp: float | None = None,
    level0_width: int | None = None,
    level0_height: int | None = None,
    quality: dict[str, np.ndarray] | None = None,
) -> None:
    """Write the coords file of one slide, atomically: as `write_slide_features`, without the features.

    `quality` holds fractions of tiles by the names of QUALITY_KEYS, (N,) each, and is written as float32 datasets.
    """
    coords = np.asarray(coords)
    check_arrays(path, None, coords)
    sizes = {"level0_width": level0_width, "level0_height": level0_height}
    arrays = {"coords": _stored_coords(coords, name, mpp, tile_size, overlap, patch_size_level0, level0_mpp, sizes)}
    for key, values in (quality or {}).items():
        assert key in QUALITY_KEYS and values.shape == (len(coords),), (key, values.shape)
        arrays[key] = StoredArray(values.astype(np.float32), len(coords), {})
    with atomic_path(path) as partial:
        write_arrays(partial, "h5", arrays, _root_attributes(mpp, tile_size, level0_mpp))


def _stored_coords(
    coords: np.ndarray,
    name: str,
    mpp: float,
    tile_size: int,
    overlap: int,
    patch_size_level0: int,
    level0_mpp: float | None,
    sizes: dict[str, int | None],
) -> StoredArray:
    """Positions with TRIDENT's attributes."""
    about = {
        "name": name,
        "patch_size": tile_size,
        "patch_size_level0": patch_size_level0,
        "target_magnification": _magnification(mpp),
        "overlap": overlap,
    }
    if level0_mpp is not None:
        about["level0_magnification"] = _magnification(level0_mpp)
    if None not in sizes.values():
        about |= sizes
    return StoredArray(coords.astype(np.int64), min(len(coords), 4096), about)


def _root_attributes(mpp: float, tile_size: int, level0_mpp: float | None) -> dict[str, Any]:
    about = {"format_version": FORMAT_VERSION, "mpp": mpp, "tile_size": tile_size}
    return about if level0_mpp is None else about | {"level0_mpp": level0_mpp}


def _magnification(mpp: float) -> int | float:
    """Nominal objective power nearest to an mpp, by the convention that 10x is 1 um/px."""
    return min(NOMINAL_MAGNIFICATIONS, key=lambda power: abs(np.log(power * mpp / 10)))
