"""Batches from the processes that read them to the one that trains, through shared memory that is used again.

PyTorch makes new shared memory for each tensor of each batch, with a file and a connection between the processes. To
get and clear memory takes several times as long as to fill it. Here a batch is one piece of memory, and a piece whose
tensors are gone takes a later batch.

Each reader has some pieces to itself. A piece is free, or sent, or held by tensors of the process that received it:
only the reader turns free into sent, and only the receiver sent into held and held into free, so nobody waits.
"""

import fcntl
import itertools
import mmap
import os
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

ALIGNMENT = 64  # bytes; more than any type needs
PIECES = 4  # of a reader: two batches that it is ahead, and two that training holds
LARGEST_PIECE = 64 << 20  # bytes kept for later; larger batches get memory of their own
FREE, SENT, HELD = range(3)

Collate = Callable[[list[dict[str, Any]]], dict[str, Tensor]]


class Place(NamedTuple):
    """Where a tensor lies in a piece of memory."""

    start: int
    shape: torch.Size
    dtype: torch.dtype


class Piece(NamedTuple):
    """Which piece of which memory holds a batch; `serial` tells the batch from others that the piece held."""

    memory: int
    reader: int
    number: int
    serial: int
    num_bytes: int


class SentBatch:
    """Tensors by name in one piece of memory, which arrive as a plain dictionary where this is unpickled."""

    def __init__(self, batch: dict[str, Tensor], memory: "BatchMemory | None" = None):
        """Copy the tensors, which may be of any shape and type, to a free piece, or else to new shared memory."""
        self._places, end = {}, 0
        for name, tensor in batch.items():
            start = -(-end // ALIGNMENT) * ALIGNMENT
            self._places[name] = Place(start, tensor.shape, tensor.dtype)
            end = start + tensor.numel() * tensor.element_size()
        found = memory.fill(max(1, end)) if memory is not None else None
        if found is None:
            self._where = bytes_ = _new_shared(max(1, end))
        else:
            self._where, bytes_ = found
        for name, view in _tensors(bytes_, self._places).items():
            view.copy_(batch[name])

    def __reduce__(self) -> tuple[Any, ...]:
        return _receive, (self._where, self._places)


def _new_shared(num_bytes: int) -> Tensor:
    """New shared memory, (num_bytes,) uint8.

    Raises:
        OSError: the machine has too little of it.
    """
    try:
        return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(num_bytes))
    except RuntimeError as error:
        raise OSError(
            f"a batch of {num_bytes / 2**20:.0f} MiB does not fit the shared memory of this machine (/dev/shm): give "
            "the container more (docker run --shm-size 8g), or --num_workers 0"
        ) from error


def _receive(where: Tensor | Piece, places: dict[str, Place]) -> dict[str, Tensor]:
    return _tensors(where if isinstance(where, Tensor) else _MEMORIES[where.memory].hold(where), places)


def _tensors(bytes_: Tensor, places: dict[str, Place]) -> dict[str, Tensor]:
    """The tensors that lie in memory, (bytes,) uint8, without a copy."""
    batch = {}
    for name, (start, shape, dtype) in places.items():
        part = bytes_[start : start + shape.numel() * dtype.itemsize]
        batch[name] = part.view(dtype).view(shape)
    return batch


class BatchMemory:
    """Pieces of memory that processes share which are forked from the one that makes this."""

    def __init__(self, num_readers: int):
        """Make empty pieces for some readers at a time.

        All lie in one file in memory, of which only what was written takes any: with a file each, loaders of many
        workers would use up what a process may have open.

        Raises:
            OSError: if the machine gives no such file.
        """
        self.key = next(_NUMBERS)
        # (readers, pieces, 2): what a piece is, and the serial number of its batch
        table = np.frombuffer(mmap.mmap(-1, num_readers * PIECES * 16), dtype=np.int64)
        self._table = table.reshape(num_readers, PIECES, 2)
        self._file = os.memfd_create("batches")
        weakref.finalize(self, _close, self._file, os.getpid())
        os.ftruncate(self._file, num_readers * PIECES * LARGEST_PIECE)
        self._maps: dict[tuple[int, int], mmap.mmap] = {}
        self._own: int | None = None
        self._serials = itertools.count(1)
        _MEMORIES[self.key] = self

    def become_reader(self) -> None:
        """Take the pieces of a reader that does not live; without any left, batches get new memory."""
        for reader in range(len(self._table)):
            try:
                # a lock of the process, which is gone with it
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, reader)
            except OSError:
                continue
            states = self._table[reader, :, 0]
            states[states == SENT] = FREE  # its reader is dead and its batch lost
            self._own = reader
            return

    def fill(self, num_bytes: int) -> tuple[Piece, Tensor] | None:
        """A free piece of this reader, now sent, and its memory (num_bytes,) uint8; None if there is none."""
        if self._own is None or num_bytes > LARGEST_PIECE:
            return None
        for number in range(PIECES):
            if self._table[self._own, number, 0] == FREE:
                serial = next(self._serials) << 32 | os.getpid()
                self._table[self._own, number] = SENT, serial
                memory = self._mapped(self._own, number, num_bytes)
                piece = Piece(self.key, self._own, number, serial, num_bytes)
                return piece, torch.from_numpy(np.frombuffer(memory, dtype=np.uint8, count=num_bytes))
        return None

    def hold(self, piece: Piece) -> Tensor:
        """The memory of a piece that was sent, (num_bytes,) uint8; it is free again when no tensor of it is left."""
        state = self._table[piece.reader, piece.number]
        if tuple(state) != (SENT, piece.serial):
            raise RuntimeError("the process that read a batch has died, and the batch with it")
        state[0] = HELD
        memory = self._mapped(piece.reader, piece.number, piece.num_bytes)
        held = np.frombuffer(memory, dtype=np.uint8, count=piece.num_bytes)
        weakref.finalize(held, _let_go, state, os.getpid()).atexit = False
        return torch.from_numpy(held)

    def _mapped(self, reader: int, number: int, num_bytes: int) -> mmap.mmap:
        known = self._maps.get((reader, number))
        if known is not None and len(known) >= num_bytes:
            return known
        size = min(num_bytes + num_bytes // 8, LARGEST_PIECE)  # batches differ a little
        start = (reader * PIECES + number) * LARGEST_PIECE
        self._maps[reader, number] = mmap.mmap(self._file, size, offset=start)
        return self._maps[reader, number]


_NUMBERS = itertools.count()
_MEMORIES: "weakref.WeakValueDictionary[int, BatchMemory]" = weakref.WeakValueDictionary()


def _let_go(state: np.ndarray, process: int) -> None:
    if os.getpid() == process:  # a fork has copies of the tensors, which go when it ends
        state[0] = FREE


def _close(file: int, process: int) -> None:
    if os.getpid() == process:
        os.close(file)


def _memory_for(num_readers: int) -> BatchMemory | None:
    """Memory for some readers; None where there are none, or the machine has no such memory."""
    if not num_readers or not hasattr(os, "memfd_create"):
        return None
    try:
        return BatchMemory(num_readers)
    except OSError:  # no more files, or none so large, are allowed: PyTorch's own way needs neither
        return None


class SendingCollate:
    """As `collate`, for a loader: a process that reads for another sends its batches as one piece of memory each."""

    def __init__(self, collate: Collate, num_workers: int):
        """Share memory with twice as many readers: those of the last pass may not be gone when the next begins."""
        self._collate = collate
        self._memory = _memory_for(2 * num_workers)
        self._is_reader = False

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Tensor] | SentBatch:
        """Collate; in a worker of the loader, ready to be sent."""
        batch = self._collate(samples)
        if get_worker_info() is None:
            return batch
        if not self._is_reader and self._memory is not None:
            self._memory.become_reader()
        self._is_reader = True
        return SentBatch(batch, self._memory)

    def __getstate__(self) -> dict[str, Any]:
        """Without the memory, which a process that is not forked does not have."""
        return self.__dict__ | {"_memory": None}
