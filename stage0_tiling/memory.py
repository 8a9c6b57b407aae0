"""Memory that goes back to the system: malloc keeps what it gets back, in one heap a thread.

While a slide is opened and its thumbnail read that comes to some 15 MiB, on top of which the tissue is then found.
"""

import ctypes
import math
import mmap
from collections import defaultdict

import numpy as np

LEAST_BYTES = 2**14


class Lender:
    """Makes uint8 arrays of memory that is used again when they are dropped, with all views of them.

    It goes back to the system when the lender and the last array are dropped. Safe to call from several threads.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[np.ndarray]] = defaultdict(list)

    def __call__(self, shape: tuple[int, ...]) -> np.ndarray:
        """An array of `shape`, with anything in it."""
        step = 0  # of powers of four, so that arrays of about one size share; pages never touched take no memory
        while LEAST_BYTES << 2 * step < math.prod(shape):
            step += 1
        free = self._free[step]
        try:
            memory = free.pop()
        except IndexError:
            memory = np.frombuffer(mmap.mmap(-1, LEAST_BYTES << 2 * step), np.uint8)
        return np.asarray(_Loan(memory, shape, free))


class _Loan:
    """What an array and all its views hold on to, and by that the memory."""

    def __init__(self, memory: np.ndarray, shape: tuple[int, ...], free: list[np.ndarray]):
        self._memory, self._free = memory, free
        self.__array_interface__ = memory.__array_interface__ | {"shape": shape, "strides": None}

    def __del__(self) -> None:
        self._free.append(self._memory)


def return_free_memory() -> None:
    """Let the C library hand back what it keeps, where it can (glibc)."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        pass
