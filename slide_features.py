"""The feature file of one slide: write it, read it, check it. The only module that knows the file's keys.

A feature file `features/<slide_id>.h5` holds

    features  (N, D) float16 or float32   one patch token per tile
    coords    (N, 2) int64                 level-0 pixels, (x, y) of the tile's top-left corner

Row i of one belongs to row i of the other. Attributes on `coords` use TRIDENT's names, so that its tools read our
files; `mpp`, `encoder`, `tile_size`, `format_version` and the other facts of `MAKING_FACTS` lie on the file root.
`coords/<slide_id>.h5` is the same without `features`, with the fraction of each tile that is tissue or an artefact
(QUALITY_KEYS, each (N,) float32). A feature file may also be a zarr archive, or a bare tensor that takes its positions
from the coords file: see `feature_containers`. Files of TRIDENT, CLAM (`.h5` and `.pt`), WSI-LLaVA (`coords_yx`) and
HistoGPT (`feats`) are read as well.
"""

import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from feature_containers import (
    SUFFIXES,
    StoredArray,
    attributes_path,
    format_of,
    open_arrays,
    read_attributes,
    read_tensor,
    write_arrays,
    write_tensor,
)
from hdf5_rows import read_rows_directly

FORMAT_VERSION = 1
FEATURE_SUFFIXES = tuple(SUFFIXES.values())
FEATURE_KEYS = ("features", "feats")
COORD_KEYS = ("coords", "coords_yx")
QUALITY_KEYS = ("tissue", "pen", "fold", "blur", "edge")
NOMINAL_MAGNIFICATIONS = (1.25, 2.5, 5, 10, 20, 40, 60, 80)
ROWS_PER_READ = 1024
GRID_STEP = 256  # spacing of made-up positions, for files that store none


class MakingFact(NamedTuple):
    """A setting that decides patch tokens or which tiles have one.

    Attributes:
        unsaid: what a file means that does not say it; None where that is unknown, and then it is not compared.
        must_agree: whether files that differ in it must not be mixed.
    """

    unsaid: Any = None
    must_agree: bool = False


# The one list of what a feature file says of its making, beside the encoder. A model keeps them in vlm.json, and a new
# slide is tiled and encoded by them: each is an argument of `stage0_tiling.encoding.encode_slide`.
MAKING_FACTS = {
    "tile_size": MakingFact(must_agree=True),
    "mpp": MakingFact(must_agree=True),
    "overlap": MakingFact(),
    "min_tissue": MakingFact(),
    "tissue_method": MakingFact("otsu"),
    "segmenter": MakingFact(),
    "max_pen": MakingFact(1.0),
    "max_fold": MakingFact(1.0),
    "max_blur": MakingFact(1.0),
    "max_edge": MakingFact(1.0),
    "icc": MakingFact(False, must_agree=True),
    "stain_normalizer": MakingFact("none", must_agree=True),
    "stain_target": MakingFact("", must_agree=True),
}


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


def with_unsaid(said: Mapping[str, Any]) -> dict[str, Any]:
    """Every one of `MAKING_FACTS`: as said, else what a file means that does not say it."""
    known = {name: value for name, value in said.items() if value is not None}
    return {name: known.get(name, fact.unsaid) for name, fact in MAKING_FACTS.items()}


def worth_saying(making: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `MAKING_FACTS` in `making` that a file must say: all but what it means without them."""
    return {
        name: making[name]
        for name, fact in MAKING_FACTS.items()
        if making.get(name) is not None and making[name] != fact.unsaid
    }


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it becomes `path` when the block ends well and is removed when it does not.

    A process that is killed in the block leaves a hidden `.<name>.<random>.partial` and never a half-written `path`.
    Processes of several machines may write the same path; their numbers may be the same, in containers they often are.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        yield partial
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


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
    _check(path, features, coords)
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
    _check(path, None, coords)
    sizes = {"level0_width": level0_width, "level0_height": level0_height}
    arrays = {"coords": _stored_coords(coords, name, mpp, tile_size, overlap, patch_size_level0, level0_mpp, sizes)}
    for key, values in (quality or {}).items():
        assert key in QUALITY_KEYS and values.shape == (len(coords),), (key, values.shape)
        arrays[key] = StoredArray(values.astype(np.float32), len(coords), {})
    with atomic_path(path) as partial:
        write_arrays(partial, "h5", arrays, _root_attributes(mpp, tile_size, level0_mpp))


def read_slide_features(
    path: str | Path, rows: np.ndarray | Callable[[np.ndarray], np.ndarray] | None = None
) -> SlideFeatures:
    """Read the patch tokens of one slide, all of them or some rows.

    Args:
        path: a feature file of ours (`.h5`, `.zarr.zip`, `.pt`), TRIDENT, CLAM (`.h5`, or `.pt`: a bare tensor),
            WSI-LLaVA or HistoGPT.
        rows: sorted row indices to read, e.g. of `choose_patches`, or a function that chooses them by all positions
            (N, 2), so that the file is opened once; None reads all. Memory follows the rows asked for.

    Returns:
        The features as stored (float64 and bfloat16 become float32). A bare tensor takes its positions from
        `../coords/<slide_id>.h5` if that has as many. A file of others without positions gets made-up ones: a square
        raster grid in row order, so that neighbours in the file stay neighbours.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read, or its features and positions do not fit.
    """
    path = _existing(path)
    if format_of(path) == "pt":
        features = read_tensor(path)
        coords, on_coords = _positions_beside(path, len(features))
        rows = rows(coords) if callable(rows) else rows
        about, rows = on_coords | read_attributes(path), slice(None) if rows is None else rows
        features, coords = np.array(features[rows]), coords[rows]
        _check(path, features, coords)
        return SlideFeatures(features, coords, **_making_of_file(about))
    with open_arrays(path) as file:
        features, coords = _read_patches(path, file, rows)
        dataset = _find(path, file, FEATURE_KEYS)
        about = dict(dataset.attrs) | dict(file.attrs) | _known(_describe(file))
    return SlideFeatures(features, coords, **_making_of_file(about))


def slide_id_of_features(path: str | Path) -> str:
    """The slide that a feature file is of, by its name."""
    path = Path(path)
    return path.name.removesuffix(SUFFIXES[format_of(path)])


def count_tiles(path: str | Path) -> int:
    """How many tiles a feature file holds, opening it without reading it: cheap, and a truncated file does not open.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be opened.
    """
    path = _existing(path)
    if format_of(path) == "pt":
        return len(read_tensor(path))
    with open_arrays(path) as file:
        return _without_batch_axis(path, _find(path, file, FEATURE_KEYS))[0]


def read_patches(
    path: str | Path, rows: np.ndarray | Callable[[np.ndarray], np.ndarray] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Read features and coords as `read_slide_features` does, without what the file says of them: in half the time."""
    path = _existing(path)
    if format_of(path) == "pt":
        slide = read_slide_features(path, rows)
        return slide.features, slide.coords
    with open_arrays(path) as file:
        return _read_patches(path, file, rows)


def read_slide_positions(path: str | Path) -> np.ndarray:
    """Read only the positions of a feature file: (N, 2) int64, level-0 (x, y). Errors as `read_slide_features`."""
    path = _existing(path)
    if format_of(path) == "pt":
        return _positions_beside(path, len(read_tensor(path)))[0]
    with open_arrays(path) as file:
        num_tiles, _ = _without_batch_axis(path, _find(path, file, FEATURE_KEYS))
        return _positions(path, file, num_tiles)


def read_slide_coords(path: str | Path) -> SlideCoords:
    """Read a coords file (ours, TRIDENT's or CLAM's), or the positions of a feature file, with what it says of them.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read or holds no positions.
    """
    path = _existing(path)
    with open_arrays(path) as file:
        _find(path, file, COORD_KEYS)
        quality = {key: file[key][:] for key in QUALITY_KEYS if key in file}
        return SlideCoords(_positions(path, file, None), **_describe(file), quality=quality)


def raster_order(coords: np.ndarray) -> np.ndarray:
    """Return the (N,) int64 indices that sort (N, 2) positions by y, then x: the fixed order of patch tokens."""
    x, y = coords.T
    if ((y[:-1] < y[1:]) | (y[:-1] == y[1:]) & (x[:-1] <= x[1:])).all():  # as our own files are
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


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no feature file {path}; stage0_tiling/encode.py makes it")
    return path


def _find(path: Path, file: Any, keys: tuple[str, ...]) -> Any:
    for key in keys:
        if hasattr(found := file.get(key), "shape"):
            return found
    found = ", ".join(file.keys()) or "nothing"
    raise ValueError(f"{path} holds no dataset `{'` or `'.join(keys)}` but {found}: is it a feature file of one slide?")


def _without_batch_axis(path: Path, dataset: Any) -> tuple[int, int]:
    """(N, D) of features stored as (N, D) or (1, N, D)."""
    shape = dataset.shape
    if len(shape) == 3 and shape[0] == 1:
        shape = shape[1:]
    if len(shape) != 2:
        raise ValueError(f"{path}: features have shape {dataset.shape}, expected (N, D) or (1, N, D)")
    return shape


def _read_patches(
    path: Path, file: Any, rows: np.ndarray | Callable[[np.ndarray], np.ndarray] | None
) -> tuple[np.ndarray, np.ndarray]:
    dataset = _find(path, file, FEATURE_KEYS)
    coords = _positions(path, file, num_tiles=_without_batch_axis(path, dataset)[0])
    rows = rows(coords) if callable(rows) else rows
    features = _float(_read_rows(path, dataset, rows))
    if rows is not None:
        coords = coords[rows]
    _check(path, features, coords)
    return features, coords


def _read_rows(path: Path, dataset: Any, rows: np.ndarray | None) -> np.ndarray:
    """Read sorted rows, straight from the file where they lie in it as they are, else span by span.

    h5py's own fancy indexing is slow, and the whole array may be large.
    """
    num_tiles, width = _without_batch_axis(path, dataset)
    select = (0,) if dataset.ndim == 3 else ()
    if rows is None:
        return dataset[select]
    rows = np.asarray(rows, dtype=np.int64)
    if rows.size and (rows[0] < 0 or rows[-1] >= num_tiles or (np.diff(rows) < 0).any()):
        raise ValueError(f"{path}: rows must be sorted and within 0 to {num_tiles - 1}")
    out = read_rows_directly(dataset, rows)
    if out is not None:
        return out
    out = np.empty((len(rows), width), dtype=dataset.dtype)
    for start in range(0, num_tiles, ROWS_PER_READ):
        first, last = np.searchsorted(rows, (start, start + ROWS_PER_READ))
        if first < last:
            low, high = rows[first], rows[last - 1] + 1
            out[first:last] = dataset[(*select, slice(low, high))][rows[first:last] - low]
    return out


def _positions(path: Path, file: Any, num_tiles: int | None) -> np.ndarray:
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


def _positions_beside(path: Path, num_tiles: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Positions of a bare tensor's rows, and what their coords file says of them; made up where there is none.

    Raises:
        ValueError: if the tensor is one of ours, whose positions are known, and they are not there.
    """
    beside = path.parent.parent / "coords" / f"{path.name.removesuffix('.pt')}.h5"
    if beside.is_file():
        with open_arrays(beside) as file:
            coords = _positions(beside, file, None)
            if len(coords) == num_tiles:
                return coords, _known(_describe(file))
    if attributes_path(path).is_file():
        why = f"holds other than {num_tiles} positions" if beside.is_file() else "is missing"
        raise ValueError(f"{path} takes its positions from {beside}, which {why}: bring that file, or encode anew")
    return _raster_grid(num_tiles), {}


def _raster_grid(num_tiles: int) -> np.ndarray:
    side = max(1, int(np.ceil(np.sqrt(num_tiles))))
    row, column = np.divmod(np.arange(num_tiles, dtype=np.int64), side)
    return np.stack([column, row], axis=1) * GRID_STEP


def _describe(file: Any) -> dict[str, Any]:
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


def _known(about: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in about.items() if value is not None}


def _making_of_file(about: dict[str, Any]) -> dict[str, Any]:
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


def _float(features: np.ndarray) -> np.ndarray:
    return features if features.dtype in (np.float16, np.float32) else features.astype(np.float32)


def _check(path: str | Path, features: np.ndarray | None, coords: np.ndarray) -> None:
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
        raise ValueError(f"{path}: {bad} of {len(features)} features are not finite: make the file again")


def _all_finite(features: np.ndarray) -> bool:
    if features.dtype != np.float16:
        return bool(np.isfinite(features).all())
    # An exponent of all ones is inf or nan: by its bits, several times as fast as numpy's half-precision arithmetic.
    exponents = np.ascontiguousarray(features).view(np.uint16) & 0x7C00
    return bool(exponents.max(initial=0) < 0x7C00)
