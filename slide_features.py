"""The feature file of one slide: write it, read it, check it. The only module that knows the file's keys.

A feature file `features/<slide_id>.h5` holds

    features  (N, D) float16 or float32   one patch token per tile
    coords    (N, 2) int64                 level-0 pixels, (x, y) of the tile's top-left corner

Row i of one belongs to row i of the other. Attributes on `coords` use TRIDENT's names, so that its tools read our
files; `mpp`, `encoder`, `tile_size` and `format_version` lie on the file root. `coords/<slide_id>.h5` is the same
without `features`. Files of TRIDENT, CLAM (`.h5` and `.pt`), WSI-LLaVA (`coords_yx`) and HistoGPT (`feats`) are read as
well.
"""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

FORMAT_VERSION = 1
FEATURE_KEYS = ("features", "feats")
COORD_KEYS = ("coords", "coords_yx")
NOMINAL_MAGNIFICATIONS = (1.25, 2.5, 5, 10, 20, 40, 60, 80)
ROWS_PER_READ = 1024
GRID_STEP = 256  # spacing of made-up positions, for files that store none


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


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it becomes `path` when the block ends well and is removed when it does not.

    A process that is killed in the block leaves a hidden `.<name>.<pid>.partial` and never a half-written `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _atomic_h5(path: str | Path) -> Iterator[h5py.File]:
    """A new HDF5 file, made in memory: the HDF5 library crashes its process when it closes a file on a full disk."""
    made = io.BytesIO()
    with h5py.File(made, "w") as file:
        yield file
    with atomic_path(path) as partial:
        partial.write_bytes(made.getbuffer())


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
) -> None:
    """Write the feature file of one slide, atomically.

    Args:
        path: the file to make; an older one is replaced.
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

    Raises:
        ValueError: if shapes or types do not fit, or a feature is not finite.
    """
    features, coords = np.asarray(features), np.asarray(coords)
    if features.dtype not in (np.float16, np.float32):
        raise ValueError(f"{path}: features must be float16 or float32, not {features.dtype}")
    _check(path, features, coords)
    with _atomic_h5(path) as file:
        rows = min(len(features), 256)
        dataset = file.create_dataset("features", data=features, chunks=(rows, features.shape[1]))
        dataset.attrs.update({"name": name, "encoder": encoder})
        file.attrs["encoder"] = encoder
        for key, value in (("min_tissue", min_tissue), ("encoder_fingerprint", encoder_fingerprint)):
            if value is not None:
                file.attrs[key] = value
        _write_coords(
            file,
            coords,
            name=name,
            mpp=mpp,
            tile_size=tile_size,
            overlap=overlap,
            patch_size_level0=patch_size_level0,
            level0_mpp=level0_mpp,
            level0_width=level0_width,
            level0_height=level0_height,
        )


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
) -> None:
    """Write the coords file of one slide, atomically: as `write_slide_features`, without the features."""
    coords = np.asarray(coords)
    _check(path, None, coords)
    with _atomic_h5(path) as file:
        _write_coords(
            file,
            coords,
            name=name,
            mpp=mpp,
            tile_size=tile_size,
            overlap=overlap,
            patch_size_level0=patch_size_level0,
            level0_mpp=level0_mpp,
            level0_width=level0_width,
            level0_height=level0_height,
        )


def read_slide_features(path: str | Path, rows: np.ndarray | None = None) -> SlideFeatures:
    """Read the patch tokens of one slide, all of them or some rows.

    Args:
        path: a feature file of ours, TRIDENT, CLAM (`.h5`, or `.pt`: a bare tensor), WSI-LLaVA or HistoGPT.
        rows: sorted row indices to read, e.g. of `choose_patches`; None reads all. Memory follows the rows asked for.

    Returns:
        The features as stored (float64 and bfloat16 become float32). A file without positions (CLAM's `.pt`) gets
        made-up ones: a square raster grid in row order, so that neighbours in the file stay neighbours.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read, or its features and positions do not fit.
    """
    path = _existing(path)
    if path.suffix == ".pt":
        features = _read_pt(path)
        coords = _raster_grid(len(features))
        if rows is not None:
            features, coords = features[rows], coords[rows]
        _check(path, features, coords)
        return SlideFeatures(features, coords)
    with _open_h5(path) as file:
        dataset = _find(path, file, FEATURE_KEYS)
        coords = _positions(path, file, num_tiles=_without_batch_axis(path, dataset)[0])
        features = _float(_read_rows(path, dataset, rows))
        if rows is not None:
            coords = coords[rows]
        _check(path, features, coords)
        about = _describe(file)
        encoder = file.attrs.get("encoder", dataset.attrs.get("encoder"))
        min_tissue, fingerprint = file.attrs.get("min_tissue"), file.attrs.get("encoder_fingerprint")
    return SlideFeatures(
        features,
        coords,
        mpp=about["mpp"],
        encoder=None if encoder is None else _text(encoder),
        tile_size=about["tile_size"],
        patch_size_level0=about["patch_size_level0"],
        overlap=about["overlap"],
        min_tissue=None if min_tissue is None else float(min_tissue),
        encoder_fingerprint=None if fingerprint is None else _text(fingerprint),
    )


def read_slide_positions(path: str | Path) -> np.ndarray:
    """Read only the positions of a feature file: (N, 2) int64, level-0 (x, y). Errors as `read_slide_features`."""
    path = _existing(path)
    if path.suffix == ".pt":
        return _raster_grid(len(_read_pt(path)))
    with _open_h5(path) as file:
        num_tiles, _ = _without_batch_axis(path, _find(path, file, FEATURE_KEYS))
        return _positions(path, file, num_tiles)


def read_slide_coords(path: str | Path) -> SlideCoords:
    """Read a coords file (ours, TRIDENT's or CLAM's), or the positions of a feature file, with what it says of them.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read or holds no positions.
    """
    path = _existing(path)
    with _open_h5(path) as file:
        _find(path, file, COORD_KEYS)
        return SlideCoords(_positions(path, file, None), **_describe(file))


def raster_order(coords: np.ndarray) -> np.ndarray:
    """Return the (N,) int64 indices that sort (N, 2) positions by y, then x: the fixed order of patch tokens."""
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


def _write_coords(
    file: h5py.File,
    coords: np.ndarray,
    *,
    name: str,
    mpp: float,
    tile_size: int,
    overlap: int,
    patch_size_level0: int,
    level0_mpp: float | None,
    level0_width: int | None,
    level0_height: int | None,
) -> None:
    dataset = file.create_dataset("coords", data=coords.astype(np.int64), chunks=(min(len(coords), 4096), 2))
    dataset.attrs.update(
        {
            "name": name,
            "patch_size": tile_size,
            "patch_size_level0": patch_size_level0,
            "target_magnification": _magnification(mpp),
            "overlap": overlap,
        }
    )
    if level0_mpp is not None:
        dataset.attrs["level0_magnification"] = _magnification(level0_mpp)
        file.attrs["level0_mpp"] = level0_mpp
    if level0_width is not None and level0_height is not None:
        dataset.attrs.update({"level0_width": level0_width, "level0_height": level0_height})
    file.attrs.update({"format_version": FORMAT_VERSION, "mpp": mpp, "tile_size": tile_size})


def _magnification(mpp: float) -> int | float:
    """Nominal objective power nearest to an mpp, by the convention that 10x is 1 um/px."""
    return min(NOMINAL_MAGNIFICATIONS, key=lambda power: abs(np.log(power * mpp / 10)))


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no feature file {path}; stage0_tiling/encode.py makes it")
    return path


def _open_h5(path: Path) -> h5py.File:
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise ValueError(
            f"{path} is not a readable HDF5 file (truncated, or another format): "
            "delete it and make it again with stage0_tiling/encode.py"
        ) from error


def _find(path: Path, file: h5py.File, keys: tuple[str, ...]) -> h5py.Dataset:
    for key in keys:
        if isinstance(file.get(key), h5py.Dataset):
            return file[key]
    found = ", ".join(file.keys()) or "nothing"
    raise ValueError(f"{path} holds no dataset `{'` or `'.join(keys)}` but {found}: is it a feature file of one slide?")


def _without_batch_axis(path: Path, dataset: h5py.Dataset) -> tuple[int, int]:
    """(N, D) of features stored as (N, D) or (1, N, D)."""
    shape = dataset.shape
    if len(shape) == 3 and shape[0] == 1:
        shape = shape[1:]
    if len(shape) != 2:
        raise ValueError(f"{path}: features have shape {dataset.shape}, expected (N, D) or (1, N, D)")
    return shape


def _read_rows(path: Path, dataset: h5py.Dataset, rows: np.ndarray | None) -> np.ndarray:
    """Read sorted rows span by span: h5py's own fancy indexing is slow, and the whole array may be large."""
    num_tiles, width = _without_batch_axis(path, dataset)
    select = (0,) if dataset.ndim == 3 else ()
    if rows is None:
        return dataset[select]
    rows = np.asarray(rows, dtype=np.int64)
    if rows.size and (rows[0] < 0 or rows[-1] >= num_tiles or (np.diff(rows) < 0).any()):
        raise ValueError(f"{path}: rows must be sorted and within 0 to {num_tiles - 1}")
    out = np.empty((len(rows), width), dtype=dataset.dtype)
    for start in range(0, num_tiles, ROWS_PER_READ):
        first, last = np.searchsorted(rows, (start, start + ROWS_PER_READ))
        if first < last:
            low, high = rows[first], rows[last - 1] + 1
            out[first:last] = dataset[(*select, slice(low, high))][rows[first:last] - low]
    return out


def _positions(path: Path, file: h5py.File, num_tiles: int | None) -> np.ndarray:
    """Read (N, 2) int64 (x, y); positions are made up where the file stores features alone."""
    key = next((key for key in COORD_KEYS if key in file), None)
    if key is None:
        return _raster_grid(num_tiles or 0)
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


def _raster_grid(num_tiles: int) -> np.ndarray:
    side = max(1, int(np.ceil(np.sqrt(num_tiles))))
    row, column = np.divmod(np.arange(num_tiles, dtype=np.int64), side)
    return np.stack([column, row], axis=1) * GRID_STEP


def _describe(file: h5py.File) -> dict[str, Any]:
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


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _float(features: np.ndarray) -> np.ndarray:
    return features if features.dtype in (np.float16, np.float32) else features.astype(np.float32)


def _read_pt(path: Path) -> np.ndarray:
    """Features of a CLAM `.pt` file, a bare tensor (N, D) or (1, N, D)."""
    import pickle

    import torch

    try:
        tensor = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path} is not a readable .pt tensor file: make it again") from error
    if not isinstance(tensor, torch.Tensor) or tensor.ndim not in (2, 3) or (tensor.ndim == 3 and len(tensor) != 1):
        shape = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise ValueError(f"{path} holds {shape}, expected one bare tensor (N, D)")
    tensor = tensor[0] if tensor.ndim == 3 else tensor
    return (tensor if tensor.dtype == torch.float16 else tensor.float()).numpy()


def _check(path: str | Path, features: np.ndarray | None, coords: np.ndarray) -> None:
    if coords.ndim != 2 or coords.shape[1] != 2 or not np.issubdtype(coords.dtype, np.integer):
        raise ValueError(f"{path}: coords must be (N, 2) integers, not {coords.shape} {coords.dtype}")
    if len(coords) == 0:
        raise ValueError(f"{path}: no tiles: leave this slide out, or tile it with a lower --min_tissue")
    if features is None:
        return
    if features.ndim != 2 or features.shape[1] == 0 or len(features) != len(coords):
        raise ValueError(f"{path}: features {features.shape} do not fit {len(coords)} positions; expected (N, D)")
    if not np.isfinite(features).all():
        bad = int((~np.isfinite(features).all(axis=1)).sum())
        raise ValueError(f"{path}: {bad} of {len(features)} features are not finite: make the file again")
