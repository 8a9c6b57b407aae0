"""Read the files of one slide, ours and those of other systems."""

import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from feature_containers import SUFFIXES, attributes_path, format_of, open_arrays, read_attributes, read_tensor
from hdf5_rows import RowPlaces, places_of_rows, read_rows_directly
from slide_features.contents import (
    COORD_KEYS,
    FEATURE_KEYS,
    QUALITY_KEYS,
    SlideCoords,
    SlideFeatures,
    check_arrays,
)
from slide_features.making import MAKING_FACTS

ROWS_PER_READ = 1024
GRID_STEP = 256  # spacing of made-up positions, for files that store none


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
        check_arrays(path, features, coords)
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
    """Read features and coords as `read_slide_features` does, without what the file says of them.

    Where they lie in an HDF5 file is remembered as long as it stays the same file, so that to read some rows again
    takes no longer than to copy them.
    """
    path = Path(path)
    if format_of(path) == "h5":
        try:
            with open(path, "rb", buffering=0) as file:
                stored = os.fstat(file.fileno())
                layout = _layout(str(path), stored.st_ino, stored.st_size, stored.st_mtime_ns)
                if layout is not None:
                    return layout.read(path, file.fileno(), rows)
        except (FileNotFoundError, IsADirectoryError):
            pass
    path = _existing(path)
    if format_of(path) == "pt":
        slide = read_slide_features(path, rows)
        return slide.features, slide.coords
    with open_arrays(path) as file:
        return _read_patches(path, file, rows)


class _Layout(NamedTuple):
    """Where features and positions lie in a file. `order` is that of the columns of its positions, (x, y) or (y, x)."""

    features: RowPlaces
    coords: RowPlaces | None
    order: slice

    def read(
        self, path: Path, file_number: int, rows: np.ndarray | Callable[[np.ndarray], np.ndarray] | None
    ) -> tuple[np.ndarray, np.ndarray]:
        num_tiles = self.features.num_rows
        everything = np.arange(num_tiles)
        if self.coords is None:
            coords = _raster_grid(num_tiles)
        else:
            stored = self.coords.read(file_number, everything, path)[:, self.order]
            coords = np.ascontiguousarray(stored, dtype=np.int64)
        rows = rows(coords) if callable(rows) else rows
        if rows is not None:
            rows = _checked(path, rows, num_tiles)
            coords = coords[rows]
        features = _float(self.features.read(file_number, everything if rows is None else rows, path))
        check_arrays(path, features, coords)
        return features, coords


@lru_cache(maxsize=2**15)
def _layout(path: str, inode: int, num_bytes: int, modified_ns: int) -> _Layout | None:
    """Layout of one version of a file; None if its rows do not lie there as they are.

    Raises:
        ValueError: as `read_slide_features`.
    """
    path = Path(path)
    with open_arrays(path) as file:
        dataset = _find(path, file, FEATURE_KEYS)
        num_tiles, _ = _without_batch_axis(path, dataset)
        features = places_of_rows(dataset)
        key = next((key for key in COORD_KEYS if key in file), None)
        coords = None if key is None else places_of_rows(file[key])
        if features is None or (key is not None and (coords is None or coords.width != 2)):
            return None
        if coords is not None and coords.num_rows != num_tiles:
            _positions(path, file, num_tiles)  # raises
        return _Layout(features, coords, slice(None, None, -1) if key == "coords_yx" else slice(None))


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
    check_arrays(path, features, coords)
    return features, coords


def _read_rows(path: Path, dataset: Any, rows: np.ndarray | None) -> np.ndarray:
    """Read sorted rows, straight from the file where they lie in it as they are, else span by span.

    h5py's own fancy indexing is slow, and the whole array may be large.
    """
    num_tiles, width = _without_batch_axis(path, dataset)
    select = (0,) if dataset.ndim == 3 else ()
    if rows is None:
        return dataset[select]
    rows = _checked(path, rows, num_tiles)
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


def _checked(path: Path, rows: np.ndarray, num_tiles: int) -> np.ndarray:
    rows = np.asarray(rows, dtype=np.int64)
    if rows.size and (rows[0] < 0 or rows[-1] >= num_tiles or (rows[1:] < rows[:-1]).any()):
        raise ValueError(f"{path}: rows must be sorted and within 0 to {num_tiles - 1}")
    return rows


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
