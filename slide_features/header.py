"""What is known of a feature file without its arrays, remembered as long as it stays the same file."""

import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from feature_containers import open_arrays
from hdf5_rows import RowPlaces, places_of_rows
from slide_features.contents import COORD_KEYS, FEATURE_KEYS, check_arrays
from slide_features.stored import (
    as_float,
    checked_rows,
    find_dataset,
    making_of,
    raster_grid,
    read_positions,
    shape_of_features,
    what_it_says,
)


class Header(NamedTuple):
    """What is known of a file without its arrays: where they lie, None where the library must read them."""

    layout: "Layout | None"
    making: dict[str, Any]


class Version(NamedTuple):
    """A file as it is now. Whoever writes it can keep its size and time of modification, but not that of change."""

    device: int
    inode: int
    num_bytes: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, file: int | str | Path) -> "Version":
        """Of an open file by its number, or of the one that a path names."""
        now = os.stat(file)
        return cls(now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns)


@lru_cache(maxsize=2**14)  # of some 2 KB each
def read_header(path: str, version: Version) -> Header | None:
    """Header of one version of an HDF5 file; None if the path names another one by now.

    Raises:
        ValueError: as `read_slide_features`.
    """
    path = Path(path)
    with open_arrays(path) as file:
        if Version.of(path) != version:
            return None
        return Header(_layout(path, file), making_of(what_it_says(path, file)))


class Layout(NamedTuple):
    """Where features and positions lie in a file. `order` is that of the columns of its positions, (x, y) or (y, x)."""

    features: RowPlaces
    coords: RowPlaces | None
    order: slice

    def read(
        self, path: Path, file_number: int, rows: np.ndarray | Callable[[np.ndarray], np.ndarray] | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Features and coords of some rows of a file that is open to read, as `reading.read_patches` gives them."""
        num_tiles = self.features.num_rows
        everything = np.arange(num_tiles)
        if self.coords is None:
            coords = raster_grid(num_tiles)
        else:
            stored = self.coords.read(file_number, everything, path)[:, self.order]
            coords = np.ascontiguousarray(stored, dtype=np.int64)
        rows = rows(coords) if callable(rows) else rows
        if rows is not None:
            rows = checked_rows(path, rows, num_tiles)
            coords = coords[rows]
        features = as_float(self.features.read(file_number, everything if rows is None else rows, path))
        check_arrays(path, features, coords)
        return features, coords


def _layout(path: Path, file: Any) -> Layout | None:
    dataset = find_dataset(path, file, FEATURE_KEYS)
    num_tiles, _ = shape_of_features(path, dataset)
    features = places_of_rows(dataset)
    key = next((key for key in COORD_KEYS if key in file), None)
    coords = None if key is None else places_of_rows(file[key])
    if features is None or (key is not None and (coords is None or coords.width != 2)):
        return None
    if coords is not None and coords.num_rows != num_tiles:
        read_positions(path, file, num_tiles)  # raises
    return Layout(features, coords, slice(None, None, -1) if key == "coords_yx" else slice(None))
