"""The containers of feature files: named arrays with attributes, in HDF5 or zarr, or one bare PyTorch tensor.

    <slide_id>.h5         HDF5
    <slide_id>.zarr.zip   a zarr v3 group in a zip archive: one file, which comes and goes whole as an HDF5 file does
    <slide_id>.pt         the features alone, as CLAM's pt_files; attributes lie beside it in <slide_id>.pt.json

What the arrays and attributes are called and mean is known to `slide_features` alone.
"""

import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

SUFFIXES = {"h5": ".h5", "pt": ".pt", "zarr": ".zarr.zip"}
MEND = "delete it and make it again with stage0_tiling/encode.py"


class StoredArray(NamedTuple):
    """An array to store, the rows of one chunk, and what is said of it."""

    values: np.ndarray
    rows_per_chunk: int
    attributes: Mapping[str, Any]


def format_of(path: Path) -> str:
    """`h5`, `pt` or `zarr`, by the file's name; an unknown name counts as HDF5."""
    return next((name for name, suffix in SUFFIXES.items() if path.name.endswith(suffix)), "h5")


def write_arrays(path: Path, container: str, arrays: Mapping[str, StoredArray], attributes: Mapping[str, Any]) -> None:
    """Write arrays and the attributes of the whole as `container`: `h5` or `zarr`.

    HDF5 is made in memory first: the HDF5 library crashes its process when it closes a file on a full disk.
    """
    chunks = {name: (array.rows_per_chunk, *array.values.shape[1:]) for name, array in arrays.items()}
    if container == "h5":
        made = io.BytesIO()
        with h5py.File(made, "w") as file:
            file.attrs.update(attributes)
            for name, array in arrays.items():
                dataset = file.create_dataset(name, data=array.values, chunks=chunks[name])
                dataset.attrs.update(array.attributes)
        path.write_bytes(made.getbuffer())
        return
    import zarr

    with zarr.storage.ZipStore(path, mode="w") as store:
        group = zarr.create_group(store, attributes=dict(attributes))
        for name, array in arrays.items():
            settings = {"chunks": chunks[name], "compressors": None, "attributes": dict(array.attributes)}
            group.create_array(name, data=array.values, **settings)


@contextmanager
def open_arrays(path: Path) -> Iterator[Any]:
    """Open an HDF5 or zarr file to read: an `h5py.File` or a `zarr.Group`, which are used alike here.

    Raises:
        ValueError: if it does not open as what its name says.
    """
    if format_of(path) != "zarr":
        try:
            file = h5py.File(path, "r")
        except OSError as error:
            raise ValueError(f"{path} is not a readable HDF5 file (truncated, or another format): {MEND}") from error
        with file:
            yield file
        return
    import zipfile

    import zarr

    try:
        store = zarr.storage.ZipStore(path, mode="r")
        group = zarr.open_group(store, mode="r")
    except (zipfile.BadZipFile, OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is not a readable zarr archive (truncated, or another format): {MEND}") from error
    with store:
        yield group


def write_tensor(path: Path, values: np.ndarray) -> None:
    """Write one bare tensor; made in memory, so that a full disk is an OSError as of other files."""
    import torch

    made = io.BytesIO()
    torch.save(torch.from_numpy(values), made)
    path.write_bytes(made.getbuffer())


def read_tensor(path: Path) -> np.ndarray:
    """Read a bare tensor (N, D) or (1, N, D) as (N, D), mapped into memory where torch can; bfloat16 becomes float32.

    Raises:
        ValueError: if the file is not readable, or holds something else.
    """
    import pickle

    import torch

    where = {"map_location": "cpu", "weights_only": True}
    try:
        try:
            tensor = torch.load(path, mmap=True, **where)
        except RuntimeError:  # the layout of torch before 1.6 cannot be mapped
            tensor = torch.load(path, **where)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path} is not a readable .pt tensor file: make it again") from error
    if not isinstance(tensor, torch.Tensor) or tensor.ndim not in (2, 3) or (tensor.ndim == 3 and len(tensor) != 1):
        shape = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise ValueError(f"{path} holds {shape}, expected one bare tensor (N, D)")
    tensor = tensor[0] if tensor.ndim == 3 else tensor
    return (tensor if tensor.dtype in (torch.float16, torch.float32) else tensor.float()).numpy()


def attributes_path(path: Path) -> Path:
    """Where the attributes of a bare tensor lie."""
    return path.with_name(path.name + ".json")


def read_attributes(path: Path) -> dict[str, Any]:
    """Attributes of a bare tensor; none where nobody wrote any.

    Raises:
        ValueError: if their file is not readable.
    """
    try:
        return json.loads(attributes_path(path).read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{attributes_path(path)} is not readable ({error}): {MEND}") from error
