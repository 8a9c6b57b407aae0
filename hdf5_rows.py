"""Rows of an HDF5 dataset read straight from its file: a few of many cost no more than themselves.

The HDF5 library reads a chunk whole for one row of it, and takes longest over selections of many rows. Where a dataset
is stored plainly, uncompressed, and its chunks span whole rows, each row lies in the file in one piece and the library
says where.
"""

import os
from itertools import pairwise
from typing import Any

import h5py
import numpy as np


def read_rows_directly(dataset: Any, rows: np.ndarray) -> np.ndarray | None:
    """Read some rows of a dataset without the HDF5 library.

    Args:
        dataset: (N, D) or (1, N, D), of a file opened to read.
        rows: sorted int64 indices within it.

    Returns:
        (len(rows), D) in the dataset's type; None if it is stored in another way, or is no HDF5 dataset, so that its
        library must read it.

    Raises:
        OSError: the file ends before a row does.
    """
    places = _places(dataset, rows) if isinstance(dataset, h5py.Dataset) else None
    if places is None:
        return None
    out = np.empty((len(rows), dataset.shape[-1]), dtype=dataset.dtype)
    row_bytes = out.strides[0]
    buffer = memoryview(out.view(np.uint8).reshape(-1))
    # Rows that lie one behind the other in the file are read together.
    firsts = np.flatnonzero(np.diff(places, prepend=-1 - row_bytes) != row_bytes).tolist()
    file_number = h5py.h5i.get_file_id(dataset.id).get_vfd_handle()
    for first, last in pairwise([*firsts, len(rows)]):
        part = buffer[first * row_bytes : last * row_bytes]
        if os.preadv(file_number, [part], int(places[first])) != len(part):
            raise OSError(f"{dataset.file.filename} ends within row {int(rows[first])}")
    return out


def _places(dataset: h5py.Dataset, rows: np.ndarray) -> np.ndarray | None:
    """Offset of each row in the file in bytes, (len(rows),) int64; None where rows do not lie there as they are."""
    file, made = h5py.h5i.get_file_id(dataset.id), dataset.id.get_create_plist()
    if file.get_access_plist().get_driver() != h5py.h5fd.SEC2 or file.get_create_plist().get_userblock():
        return None  # another driver has no file of its own; a userblock shifts what the library says of chunks
    if made.get_nfilters() or made.get_external_count():
        return None
    row_bytes = dataset.shape[-1] * dataset.dtype.itemsize
    if made.get_layout() == h5py.h5d.CONTIGUOUS:
        start = dataset.id.get_offset()
        return None if start is None else start + rows * row_bytes
    if made.get_layout() != h5py.h5d.CHUNKED or dataset.chunks[-1] != dataset.shape[-1]:
        return None
    rows_per_chunk = dataset.chunks[-2]
    chunk_of_row = rows // rows_per_chunk
    is_new = np.diff(chunk_of_row, prepend=-1) != 0  # rows are sorted
    chunks = chunk_of_row[is_new]
    batch_axis = (0,) * (dataset.ndim - 2)
    starts = [
        dataset.id.get_chunk_info_by_coord((*batch_axis, first, 0)).byte_offset
        for first in (chunks * rows_per_chunk).tolist()
    ]
    if None in starts:  # never written: the library fills it
        return None
    return np.array(starts, dtype=np.int64)[np.cumsum(is_new) - 1] + rows % rows_per_chunk * row_bytes
