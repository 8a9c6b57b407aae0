"""Rows of an HDF5 dataset read straight from its file: a few of many cost no more than themselves.

The HDF5 library reads a chunk whole for one row of it, and takes longest over opening a file and over selections of
many rows. Where a dataset is stored plainly, uncompressed, and its chunks span whole rows, each row lies in the file in
one piece and the library says where. That holds as long as the file does not change, so it need be asked once.
"""

import os
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np


@dataclass(frozen=True)
class RowPlaces:
    """Where the rows of a dataset (N, D) or (1, N, D) lie in its file.

    Attributes:
        num_rows: N.
        width: D.
        dtype: of the values, as they lie there.
        rows_per_chunk: in a row in the file.
        starts: offset of each chunk in bytes, (chunks,) int64.
    """

    num_rows: int
    width: int
    dtype: np.dtype
    rows_per_chunk: int
    starts: np.ndarray

    def read(self, file_number: int, rows: np.ndarray, name: object = "the file") -> np.ndarray:
        """Read some rows.

        Args:
            file_number: of the file, open to read.
            rows: sorted int64 indices within it.
            name: of the file, for messages.

        Returns:
            (len(rows), D) as stored.

        Raises:
            OSError: the file ends before a row does.
        """
        chunks, within = np.divmod(rows, self.rows_per_chunk)
        out = np.empty((len(rows), self.width), dtype=self.dtype)
        row_bytes = out.strides[0]
        places = self.starts[chunks] + within * row_bytes
        buffer = memoryview(out.view(np.uint8).reshape(-1))
        # Rows that lie one behind the other in the file are read together.
        is_first = np.ones(len(rows), dtype=bool)
        np.not_equal(places[1:], places[:-1] + row_bytes, out=is_first[1:])
        firsts = np.flatnonzero(is_first)
        ends = [*(firsts[1:] * row_bytes).tolist(), len(rows) * row_bytes]
        preadv, start = os.preadv, 0
        for offset, end in zip(places[firsts].tolist(), ends, strict=True) if len(rows) else ():
            if preadv(file_number, (buffer[start:end],), offset) != end - start:
                raise OSError(f"{name} ends within row {int(rows[start // row_bytes])}")
            start = end
        return out


def places_of_rows(dataset: Any, rows: np.ndarray | None = None) -> RowPlaces | None:
    """Where rows of a dataset lie; None if they do not lie there as they are, or it is no HDF5 dataset.

    Args:
        dataset: (N, D) or (1, N, D), of a file opened to read.
        rows: those whose places are wanted, int64; None for all.
    """
    if not isinstance(dataset, h5py.Dataset) or dataset.ndim not in (2, 3) or 0 in dataset.shape:
        return None
    file, made = h5py.h5i.get_file_id(dataset.id), dataset.id.get_create_plist()
    if file.get_access_plist().get_driver() != h5py.h5fd.SEC2 or file.get_create_plist().get_userblock():
        return None  # another driver has no file of its own; a userblock shifts what the library says of chunks
    if made.get_nfilters() or made.get_external_count():
        return None
    num_rows, width = dataset.shape[-2:]
    if made.get_layout() == h5py.h5d.CONTIGUOUS:
        start = dataset.id.get_offset()
        return None if start is None else RowPlaces(num_rows, width, dataset.dtype, num_rows, np.array([start]))
    if made.get_layout() != h5py.h5d.CHUNKED or dataset.chunks[-1] != width:
        return None
    rows_per_chunk = dataset.chunks[-2]
    num_chunks, batch_axis = -(-num_rows // rows_per_chunk), (0,) * (dataset.ndim - 2)
    starts = np.zeros(num_chunks, dtype=np.int64)
    for chunk in range(num_chunks) if rows is None else np.unique(rows // rows_per_chunk).tolist():
        start = dataset.id.get_chunk_info_by_coord((*batch_axis, chunk * rows_per_chunk, 0)).byte_offset
        if start is None:  # never written: the library fills it
            return None
        starts[chunk] = start
    return RowPlaces(num_rows, width, dataset.dtype, rows_per_chunk, starts)


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
    rows = np.asarray(rows, dtype=np.int64)
    places = places_of_rows(dataset, rows)
    if places is None:
        return None
    return places.read(h5py.h5i.get_file_id(dataset.id).get_vfd_handle(), rows, dataset.file.filename)
