"""Labelled records as the classifier's inputs: images, tiles, montages of tiles, or bags of features.

An example is one picture or one bag; a record has one or several, and its predictions are averaged over them.
"""

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from slide_reports import RecordBatches, SampleKey, read_case
from slide_reports.cases import read_image
from stage0_encoder.labels import UNLABELLED, LabelledRecords
from stage0_encoder.tile_files import montage

INPUTS = ("images", "montage", "tiles", "bags")


@dataclass
class Examples(Dataset):
    """Labelled pictures or bags, looked up by :class:`slide_reports.SampleKey`.

    Attributes:
        kind: one of `INPUTS`.
        sources: for each example the position of its record, its files, and the number of its tile in them.
        labels: (N, L) int64 classes of the records.
        transform: ``PIL.Image -> (3, height, width)`` tensor; None for bags.
        seed: of augmentation and of the choice of tiles; None for neither, as in evaluation.
        montage_side: tiles in a row of a montage.
        max_tiles: feature vectors of a bag at most.
    """

    kind: str
    sources: list[tuple[int, tuple[Path, ...], int]]
    labels: np.ndarray
    transform: Callable[[Image.Image], Tensor] | None
    seed: int | None = None
    montage_side: int = 4
    max_tiles: int = 4096

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        """``input``, a picture (3, H, W) or a bag (n, D) float32; ``labels`` (L,) int64; ``record`` and ``example``.

        An input that cannot be read is said and replaced by the next, whose labels then do not count.

        Raises:
            ValueError: no input can be read.
        """
        for tried in range(len(self)):
            index = (key.index + tried) % len(self)
            record, paths, tile = self.sources[index]
            try:
                value = self._read(paths, tile, index, key.epoch)
            except (ValueError, OSError) as error:
                print(f"left out of epoch {key.epoch + 1}: {error}", file=sys.stderr)
                continue
            counts = key.supervised and not tried
            labels = self.labels[record] if counts else np.full_like(self.labels[record], UNLABELLED)
            return {"input": value, "labels": labels, "record": record, "counts": counts, "is_bad": bool(tried)}
        raise ValueError("no input can be read; see the messages above")

    def _read(self, paths: tuple[Path, ...], tile: int, index: int, epoch: int) -> Tensor:
        """What is drawn depends on seed, epoch and the example's place alone, whichever process reads it."""
        entropy = None if self.seed is None else [self.seed, epoch, index]
        rng = None if entropy is None else np.random.default_rng(entropy)
        if self.kind == "bags":
            budgets = {"num_patches": self.max_tiles, "num_visual_tokens": self.max_tiles}
            case = read_case(paths, **budgets, rng=rng)
            return torch.cat([torch.as_tensor(part) for part in case["patch_tokens"]]).float()
        with seeded(entropy):
            if self.kind == "images":
                return read_image(paths[0], self.transform)
            tiles = np.load(paths[0], mmap_mode="r", allow_pickle=False)
            picture = tiles[tile] if self.kind == "tiles" else montage(tiles, self.montage_side, rng)
            return self.transform(Image.fromarray(np.array(picture)))


@contextmanager
def seeded(entropy: list[int] | None) -> Iterator[None]:
    """Within, what is drawn from the global generators (as augmentation does) comes from ``entropy``; None: as it is.

    The generators are as they were afterwards, so that what the model draws does not depend on who reads the data.
    """
    if entropy is None:
        yield
        return
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seeds = np.random.SeedSequence(entropy).generate_state(3)
    random.seed(int(seeds[0]))
    np.random.seed(int(seeds[1]))
    torch.manual_seed(int(seeds[2]))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def sources_of(
    cases: LabelledRecords, kind: str, tile_files: dict[Path, Path]
) -> list[tuple[int, tuple[Path, ...], int]]:
    """The examples of records, see `Examples.sources`. ``tile_files`` are those of the records' coords files."""
    sources = []
    for record, paths in enumerate(tuple(record.inputs) for record in cases.records):
        if kind == "bags":
            sources.append((record, paths, 0))
            continue
        for path in paths:
            own = tile_files[path] if kind in ("tiles", "montage") else path
            num_tiles = len(np.load(own, mmap_mode="r", allow_pickle=False)) if kind == "tiles" else 1
            sources += [(record, (own,), tile) for tile in range(num_tiles)]
    return sources


def collate(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Samples to a batch.

    ``pixels`` (B, 3, H, W), or ``features`` (B, N, D) with ``patch_mask`` (B, N); ``labels`` (B, 1 + L) int64, whose
    first column is always `UNLABELLED` as that of a text's first token is, so that `report_loss.optimizer_step` counts
    them; ``attention_mask`` (B, 1); ``record`` (B,) int64; ``counts`` and ``is_bad`` (B,) bool.
    """
    inputs = [sample["input"] for sample in samples]
    labels = torch.from_numpy(np.stack([sample["labels"] for sample in samples]))
    batch = {
        "labels": torch.cat([torch.full_like(labels[:, :1], UNLABELLED), labels], dim=1),
        "record": torch.tensor([sample["record"] for sample in samples]),
        "counts": torch.tensor([sample["counts"] for sample in samples]),
        "is_bad": torch.tensor([sample["is_bad"] for sample in samples]),
    }
    if inputs[0].ndim == 3:
        return batch | {"pixels": torch.stack(inputs), "attention_mask": torch.ones(len(inputs), 1, dtype=torch.bool)}
    lengths = torch.tensor([len(bag) for bag in inputs])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return batch | {"features": torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True), "patch_mask": mask}


def make_loader(examples: Examples, batches: RecordBatches, num_workers: int) -> DataLoader:
    """Loader with a random generator of its own, so that making an iterator leaves the global one as it was."""
    return DataLoader(
        examples,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=num_workers,
        generator=torch.Generator().manual_seed(0),
        pin_memory=torch.cuda.is_available(),
    )
