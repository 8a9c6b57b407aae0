"""What the arrays and attributes of a file of one slide mean, ours and those of other systems."""

from pathlib import Path
from typing import Any

import numpy as np

from slide_features.contents import COORD_KEYS, FEATURE_KEYS
from slide_features.making import MAKING_FACTS

GRID_STEP = 256  # spacing of made-up positions, for files that store none


def find_dataset(path: Path, file: Any, keys: tuple[str, ...]) -> Any:
    """The first array of these names in a file; ValueError with what there is instead."""
    for key in keys:
        if hasattr(found := file.get(key), "shape"):
            return found
    found = ", ".join(file.keys()) or "nothing"
    raise ValueError(f"{path} holds no dataset `{'` or `'.join(keys)}` but {found}: is it a feature file of one slide?")


def shape_of_features(path: Path, dataset: Any) -> tuple[int, int]:
    """(N, D) of features stored as (N, D) or (1, N, D)."""
    shape = dataset.shape
    if len(shape) == 3 and shape[0] == 1:
        shape = shape[1:]
    if len(shape) != 2:
        raise ValueError(f"{path}: features have shape {dataset.shape}, expected (N, D) or (1, N, D)")
    return shape


def read_positions(path: Path, file: Any, num_tiles: int | None) -> np.ndarray:
    """Read (N, 2) int64 (x, y); positions are made up where the file stores features alone."""
    key = next((key for key in COORD_KEYS if key in file), None)
    if key is None:
        return raster_grid(num_tiles or 0)
    coords = file[key][()]
    if coords.ndim == 3 and coords.shape[0] == 1:
        coords = coords[0]
    if key == "coords_yx" and coords.ndim == 2:
        coords = coords[:, ::-1]
    if coords.ndim != 2 or coords.shape[1] != 2:
        raise ValueError(f"{path}: `{key}` has shape {coords.shape}, expected (N, 2)")
    if num_tiles is not None and len(coords) != num_tiles:
        raise ValueError(f"{path}: {num_tiles} features but {len(coords)} positions: delete the file and make it again")
    return np.ascontiguousarray(coords, dtype=np.int64)


def raster_grid(num_tiles: int) -> np.ndarray:
    """Made-up positions (N, 2) int64: a square grid in row order, so that neighbours in the file stay neighbours."""
    side = max(1, int(np.ceil(np.sqrt(num_tiles))))
    row, column = np.divmod(np.arange(num_tiles, dtype=np.int64), side)
    return np.stack([column, row], axis=1) * GRID_STEP


def what_it_says(path: Path, file: Any) -> dict[str, Any]:
    """What a file says, by our names."""
    return dict(find_dataset(path, file, FEATURE_KEYS).attrs) | dict(file.attrs) | known(describe_tiles(file))


def describe_tiles(file: Any) -> dict[str, Any]:
    """What the file says about its tiles, by our names; None where it says nothing."""
    dataset = next((file[key] for key in COORD_KEYS if key in file), None)
    on_coords = {} if dataset is None else dict(dataset.attrs)
    magnification = on_coords.get("target_magnification")
    mpp = file.attrs.get("mpp", 10 / float(magnification) if magnification else None)
    sizes = {key: on_coords.get(key) for key in ("overlap", "patch_size_level0", "level0_width", "level0_height")}
    level0_mpp = file.attrs.get("level0_mpp")
    name = on_coords.get("name")
    tile_size = file.attrs.get("tile_size", on_coords.get("patch_size"))
    return {
        "name": None if name is None else _text(name),
        "mpp": None if mpp is None else float(mpp),
        "tile_size": None if tile_size is None else int(tile_size),
        "level0_mpp": None if level0_mpp is None else float(level0_mpp),
        **{key: None if value is None else int(value) for key, value in sizes.items()},
    }


def known(about: dict[str, Any]) -> dict[str, Any]:
    """What is not None."""
    return {name: value for name, value in about.items() if value is not None}


def making_of(about: dict[str, Any]) -> dict[str, Any]:
    """What a `SlideFeatures` says of its making, from a file's attributes by our names."""
    said = {name: _plain(about[name]) for name in MAKING_FACTS if about.get(name) is not None}
    own = {name: said.pop(name) for name in ("tile_size", "mpp", "overlap", "min_tissue") if name in said}
    texts = {name: _text(about[name]) for name in ("encoder", "encoder_fingerprint") if about.get(name) is not None}
    return own | texts | {"patch_size_level0": about.get("patch_size_level0"), "more_making": said}


def _plain(value: Any) -> Any:
    """A value as Python's own type, whatever the container made of it."""
    value = value.item() if isinstance(value, np.generic) else value
    return value.decode() if isinstance(value, bytes) else value


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def checked_rows(path: Path, rows: np.ndarray, num_tiles: int) -> np.ndarray:
    """Rows as int64; ValueError unless they are sorted and there."""
    rows = np.asarray(rows, dtype=np.int64)
    if rows.size and (rows[0] < 0 or rows[-1] >= num_tiles or (rows[1:] < rows[:-1]).any()):
        raise ValueError(f"{path}: rows must be sorted and within 0 to {num_tiles - 1}")
    return rows


def as_float(features: np.ndarray) -> np.ndarray:
    """Features as float16 or float32, float32 where they are stored as anything else."""
    return features if features.dtype in (np.float16, np.float32) else features.astype(np.float32)
