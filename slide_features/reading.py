"""Read the files of one slide, ours and those of other systems."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from feature_containers import SUFFIXES, attributes_path, format_of, open_arrays, read_attributes, read_tensor
from hdf5_rows import read_rows_directly
from slide_features.contents import (
    COORD_KEYS,
    FEATURE_KEYS,
    QUALITY_KEYS,
    NotFiniteError,
    SlideCoords,
    SlideFeatures,
    check_arrays,
)
from slide_features.header import Version, read_header
from slide_features.stored import (
    as_float,
    checked_rows,
    describe_tiles,
    find_dataset,
    known,
    making_of,
    raster_grid,
    read_positions,
    shape_of_features,
    what_it_says,
)

ROWS_PER_READ = 1024


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
        ValueError: if it cannot be read, its features and positions do not fit, or a feature that was asked for is not
            finite; the message then says how many of all are not.
    """
    return _counting_bad(_read_slide, Path(path), rows)


def _counting_bad(read: Callable, path: Path, rows: Any) -> Any:
    """What ``read`` gives of some rows; where one is bad, it reads all, so that its message counts in the whole file.

    Raises:
        NotFiniteError: of all rows.
    """
    try:
        return read(path, rows)
    except NotFiniteError:
        if rows is not None:
            read(path, None)
        raise


def _read_slide(path: Path, rows: np.ndarray | Callable[[np.ndarray], np.ndarray] | None) -> SlideFeatures:
    if format_of(path) == "pt":
        features = read_tensor(_existing(path))
        coords, on_coords = _positions_beside(path, len(features))
        rows = rows(coords) if callable(rows) else rows
        about, rows = on_coords | read_attributes(path), slice(None) if rows is None else rows
        features, coords = np.array(features[rows]), coords[rows]
        check_arrays(path, features, coords)
        return SlideFeatures(features, coords, **making_of(about))
    features, coords, making = _read(path, rows)
    return SlideFeatures(features, coords, **making)


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
        return shape_of_features(path, find_dataset(path, file, FEATURE_KEYS))[0]


def read_patches(
    path: str | Path, rows: np.ndarray | Callable[[np.ndarray], np.ndarray] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Read features and coords as `read_slide_features` does, without what the file says of them."""
    path = Path(path)
    if format_of(path) == "pt":
        slide = read_slide_features(path, rows)
        return slide.features, slide.coords
    return _counting_bad(_read, path, rows)[:2]


def _read(
    path: Path, rows: np.ndarray | Callable[[np.ndarray], np.ndarray] | None
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Features, coords, and what the file says of its making as fields of `SlideFeatures`.

    What an HDF5 file says, and where its rows lie, is remembered as long as it stays the same file, so that to read
    some rows of it again takes no longer than to copy them.
    """
    if format_of(path) == "h5":
        try:
            with open(path, "rb", buffering=0) as file:
                header = read_header(str(path), Version.of(file.fileno()))
                if header is not None and header.layout is not None:
                    features, coords = header.layout.read(path, file.fileno(), rows)
                    return features, coords, header.making | {"more_making": dict(header.making["more_making"])}
        except (FileNotFoundError, IsADirectoryError):
            pass
    with open_arrays(_existing(path)) as file:
        return *_read_patches(path, file, rows), making_of(what_it_says(path, file))


def read_slide_coords(path: str | Path) -> SlideCoords:
    """Read a coords file (ours, TRIDENT's or CLAM's), or the positions of a feature file, with what it says of them.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read or holds no positions.
    """
    path = _existing(path)
    with open_arrays(path) as file:
        find_dataset(path, file, COORD_KEYS)
        quality = {key: file[key][:] for key in QUALITY_KEYS if key in file}
        return SlideCoords(read_positions(path, file, None), **describe_tiles(file), quality=quality)


def _existing(path: str | Path) -> Path:
    """Return the path of a file, or raise FileNotFoundError with what makes it."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no feature file {path}; stage0_tiling/encode.py makes it")
    return path


def _read_patches(
    path: Path, file: Any, rows: np.ndarray | Callable[[np.ndarray], np.ndarray] | None
) -> tuple[np.ndarray, np.ndarray]:
    dataset = find_dataset(path, file, FEATURE_KEYS)
    coords = read_positions(path, file, num_tiles=shape_of_features(path, dataset)[0])
    rows = rows(coords) if callable(rows) else rows
    features = as_float(_read_rows(path, dataset, rows))
    if rows is not None:
        coords = coords[rows]
    check_arrays(path, features, coords)
    return features, coords


def _read_rows(path: Path, dataset: Any, rows: np.ndarray | None) -> np.ndarray:
    """Read sorted rows, straight from the file where they lie in it as they are, else span by span.

    h5py's own fancy indexing is slow, and the whole array may be large.
    """
    num_tiles, width = shape_of_features(path, dataset)
    select = (0,) if dataset.ndim == 3 else ()
    if rows is None:
        return dataset[select]
    rows = checked_rows(path, rows, num_tiles)
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


def _positions_beside(path: Path, num_tiles: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Positions of a bare tensor's rows, and what their coords file says of them; made up where there is none.

    Raises:
        ValueError: if the tensor is one of ours, whose positions are known, and they are not there.
    """
    beside = path.parent.parent / "coords" / f"{path.name.removesuffix('.pt')}.h5"
    if beside.is_file():
        with open_arrays(beside) as file:
            coords = read_positions(beside, file, None)
            if len(coords) == num_tiles:
                return coords, known(describe_tiles(file))
    if attributes_path(path).is_file():
        why = f"holds other than {num_tiles} positions" if beside.is_file() else "is missing"
        raise ValueError(f"{path} takes its positions from {beside}, which {why}: bring that file, or encode anew")
    return raster_grid(num_tiles), {}
