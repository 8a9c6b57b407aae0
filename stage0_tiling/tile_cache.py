"""Decoded tiles that another read will want, up to a number of bytes."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from threading import Lock

import numpy as np

MIN_BYTES = 128 * 2**20
MAX_BYTES = 512 * 2**20
SHARED_ROWS = 1.25  # what boxes that follow each other from top to bottom share, and a little for threads
ROWS = 2.5  # tiles that straddle two rows of compressed tiles, read row by row, want both, and a little for threads


def bytes_for(width: int, height: int, bytes_per_pixel: int) -> int:
    """Bytes that suffice to read a slide row by row and decode nothing twice, within bounds.

    Args:
        width: pixels of a level.
        height: pixels of its compressed tiles.
        bytes_per_pixel: of decoded tiles.
    """
    return min(max(MIN_BYTES, int(ROWS * width * height * bytes_per_pixel)), MAX_BYTES)


class TileCache:
    """Keeps the tiles used last, up to a number of bytes. Threads that want one tile at a time decode it once."""

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._tiles: OrderedDict[Hashable, np.ndarray] = OrderedDict()
        self._pending: dict[Hashable, Future[np.ndarray]] = {}
        self._lock = Lock()

    def get(self, key: Hashable, make: Callable[[], np.ndarray]) -> np.ndarray:
        """The tile of `key`, made by `make` unless it is here or another thread is at it."""
        with self._lock:
            if (tile := self._tiles.get(key)) is not None:
                self._tiles.move_to_end(key)
                return tile
            if (pending := self._pending.get(key)) is None:
                mine = self._pending[key] = Future()
        if pending is not None:
            return pending.result()
        try:
            tile = make()
        except BaseException as error:  # also an interrupt: the threads that wait must not wait for ever
            with self._lock:
                del self._pending[key]
            mine.set_exception(error)
            raise
        with self._lock:
            del self._pending[key]
            self._tiles[key] = tile
            self._num_bytes += tile.nbytes
            while self._num_bytes > self._max_bytes:
                self._num_bytes -= self._tiles.popitem(last=False)[1].nbytes
        mine.set_result(tile)
        return tile
