"""Batches from the process that reads them to the one that trains: as one piece of shared memory each.

PyTorch shares every tensor of a batch by itself, with a file and a connection between the processes for each, which
takes longer than to read the batch.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from slide_reports.batches import collate

ALIGNMENT = 64  # bytes; more than any type needs


class Place(NamedTuple):
    """Where a tensor lies in the shared piece."""

    start: int
    shape: torch.Size
    dtype: torch.dtype


class SharedBatch:
    """Tensors by name that become one piece of shared memory when they are sent, and arrive as a plain dictionary."""

    def __init__(self, batch: dict[str, Tensor]):
        """Hold the tensors, which may be of any shape and type, on the CPU."""
        self.batch = batch

    def __reduce__(self) -> tuple[Any, ...]:
        places, end = {}, 0
        for name, tensor in self.batch.items():
            start = -(-end // ALIGNMENT) * ALIGNMENT
            places[name] = Place(start, tensor.shape, tensor.dtype)
            end = start + tensor.numel() * tensor.element_size()
        shared = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(max(1, end)))
        for name, view in take_apart(shared, places).items():
            view.copy_(self.batch[name])
        return take_apart, (shared, places)


def take_apart(shared: Tensor, places: dict[str, Place]) -> dict[str, Tensor]:
    """The tensors that lie in a piece of memory, (bytes,) uint8, without a copy."""
    batch = {}
    for name, (start, shape, dtype) in places.items():
        part = shared[start : start + shape.numel() * dtype.itemsize]
        batch[name] = part.view(dtype).view(shape)
    return batch


def collate_to_send(samples: list[dict[str, Any]]) -> dict[str, Tensor] | SharedBatch:
    """As `collate`; in a process that reads for another, made so that it is sent at once."""
    batch = collate(samples)
    return batch if get_worker_info() is None else SharedBatch(batch)
