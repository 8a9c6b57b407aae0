"""Pairs of an image, or a slide, and its text: from records to batches of contrastive training.

A record with several images or slides gives as many items, which share its text and are positives of each other.

Shapes: I items, B of a batch, N tiles, E width of their features, T tokens.
"""

import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from slide_encoders import tile_cells
from slide_features import choose_patches, raster_order, read_slide_features
from slide_reports import Record, RecordBatches, SampleKey
from slide_reports.batches import case_numbers
from slide_reports.cases import read_image
from slide_reports.inputs import check_making
from slide_reports.table import fields
from slide_reports.transfer import SendingCollate
from stage0_encoder.text_encoder import TextTokens


@dataclass(frozen=True)
class Items:
    """Which record, input, case and text each item has; all (I,) int64.

    Attributes:
        records: place of the record.
        inputs: which of its inputs.
        cases: number of the case; records of the same inputs are one case.
        texts: number of the text; texts that differ in blanks or case alone are the same.
    """

    records: np.ndarray
    inputs: np.ndarray
    cases: np.ndarray
    texts: np.ndarray

    def __len__(self) -> int:
        return len(self.records)

    @classmethod
    def of(cls, records: Sequence[Record]) -> "Items":
        """One item for each input of each record."""
        numbers: dict[bytes, int] = {}
        counts, texts = [], []
        for paths, turns in fields(records, "inputs", "turns"):
            digest = hashlib.sha256(" ".join(text_of(turns).split()).casefold().encode()).digest()
            texts.append(numbers.setdefault(digest, len(numbers)))
            counts.append(len(paths))
        owner = np.repeat(np.arange(len(records)), counts)
        place = np.concatenate([np.arange(count) for count in counts]) if counts else np.zeros(0, np.int64)
        return cls(owner, place, case_numbers(records)[owner], np.array(texts, dtype=np.int64)[owner])


def text_of(turns: Sequence[tuple[str, str]]) -> str:
    """The text of a record: its report, or all answers of a conversation."""
    return "\n".join(answer for _, answer in turns if answer)


@dataclass
class PairDataset(Dataset):
    """Items as model inputs, looked up by :class:`SampleKey`.

    Attributes:
        records: with inputs and answers.
        items: of the records.
        tokens: of the text encoder.
        num_patches: patch tokens of a slide at most.
        image_transform: of the image encoder; None where inputs are feature files.
        seed: of the random choice of patches, drawn by seed, epoch and item; None chooses them evenly spaced.
        expected: how feature files must have been made.
    """

    records: Sequence[Record]
    items: Items
    tokens: TextTokens
    num_patches: int
    image_transform: Callable | None = None
    seed: int | None = None
    expected: dict[str, Any] | None = None

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        """The item, or the next that can be read, which then does not count (`is_valid`).

        Raises:
            ValueError: no item can be read.
        """
        for tried in range(len(self)):
            index = (key.index + tried) % len(self)
            record = self.records[int(self.items.records[index])]
            path = record.inputs[int(self.items.inputs[index])]
            try:
                inputs = self._input(path, index, key.epoch)
            except (ValueError, OSError) as error:
                print(f"left out of epoch {key.epoch + 1}: {record.id}: {error}", file=sys.stderr)
                continue
            about = {"cases": self.items.cases[index], "texts": self.items.texts[index], "items": index}
            valid = {"is_valid": key.supervised and not tried, "is_bad": bool(tried)}
            return inputs | about | valid | {"ids": self.tokens.ids_of(text_of(record.turns))}
        raise ValueError("no record's input can be read; see the messages above")

    def _input(self, path: Path, index: int, epoch: int) -> dict[str, Tensor]:
        if self.image_transform is not None:
            return {"pixel_values": read_image(path, self.image_transform)}
        rng = None if self.seed is None else np.random.default_rng([self.seed, epoch, index])
        check_making(path, self.expected or {})
        return read_bag(path, self.num_patches, rng)


def read_bag(path: Path, num_patches: int, rng: np.random.Generator | None) -> dict[str, Tensor]:
    """Patch tokens of a slide in raster order, all or a choice of them.

    Returns:
        ``patch_tokens`` (N, E) as stored, and ``cells`` (N, 2) int64, their places in the grid of tiles.
    """
    spacing = 1

    def chosen(coords: np.ndarray) -> np.ndarray:
        nonlocal spacing
        spacing = tile_pitch(coords)
        return np.sort(raster_order(coords)[choose_patches(len(coords), num_patches, rng)])

    slide = read_slide_features(path, rows=chosen)
    order = raster_order(slide.coords)
    side = slide.patch_size_level0 or spacing
    cells = tile_cells(torch.from_numpy(slide.coords[order].astype(np.int64)), side)
    return {"patch_tokens": torch.from_numpy(slide.features[order]), "cells": cells}


def tile_pitch(coords: np.ndarray) -> int:
    """Least distance of neighbouring columns or rows of tiles, level-0 pixels; 1 of a single tile."""
    steps = [np.diff(np.unique(coords[:, axis])) for axis in (0, 1)]
    return min((int(step.min()) for step in steps if len(step)), default=1)


def collate_pairs(samples: list[dict[str, Any]], tokens: TextTokens) -> dict[str, Tensor]:
    """Pad items to the longest of this batch; every tensor has an item a row."""
    batch = {name: torch.tensor([int(sample[name]) for sample in samples]) for name in ("cases", "texts", "items")}
    batch |= {name: torch.tensor([bool(sample[name]) for sample in samples]) for name in ("is_valid", "is_bad")}
    batch["input_ids"], batch["text_mask"] = tokens.pad([sample["ids"] for sample in samples])
    if "pixel_values" in samples[0]:
        return batch | {"pixel_values": torch.stack([sample["pixel_values"] for sample in samples])}
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    widest = reduce(torch.promote_types, {sample["patch_tokens"].dtype for sample in samples})
    batch["patch_tokens"] = pad([sample["patch_tokens"].to(widest) for sample in samples])
    batch["cells"] = pad([sample["cells"] for sample in samples])
    batch["patch_mask"] = pad([torch.ones(len(sample["cells"]), dtype=torch.bool) for sample in samples])
    return batch


def make_pair_loader(dataset: PairDataset, batches: RecordBatches, num_workers: int) -> DataLoader:
    """Loader with a random generator of its own, so that making an iterator leaves the global one as it was."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=SendingCollate(partial(collate_pairs, tokens=dataset.tokens), num_workers),
        num_workers=num_workers,
        generator=torch.Generator().manual_seed(0),
        pin_memory=torch.cuda.is_available(),
    )
