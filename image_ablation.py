"""Whether a trained model uses the image: its validation loss with the right, another record's and empty features.

A model that writes the average report has a low loss too. Given another record's features, a model that looks at them
does worse; one that does not, does equally well.
"""

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from command_line import counted
from report_loss import evaluation_loss
from slide_reports import Record, RecordBatches, ReportDataset, make_loader

# The image counts as used where another record's features raise the loss by at least one per cent.
USED_FROM_RATIO = 1.01
ABLATION_FLAGS = ("image_ablation_records", "batch_size", "num_workers", "seed")


@dataclass(frozen=True)
class ImageAblation:
    """Losses per supervised token of the same records and answers.

    Attributes:
        num_records: that were compared.
        right: loss with each record's own features.
        shuffled: loss with those of another record, of another report wherever there is one.
        zero: loss with features that are all zero; beside the other two only, since such features never occurred.
        shuffled_over_right: their ratio; 1 where features make no difference.
        uses_image: whether that is at least :data:`USED_FROM_RATIO`.
    """

    num_records: int
    right: float
    shuffled: float
    zero: float
    shuffled_over_right: float
    uses_image: bool

    def lines(self) -> list[str]:
        """What a user is told."""
        losses = f"right {self.right:.4f}, shuffled {self.shuffled:.4f}, zero {self.zero:.4f}"
        told = [f"image ablation on {counted(self.num_records, 'record')}: loss with features {losses}"]
        if not self.uses_image:
            rise = 100 * (self.shuffled_over_right - 1)
            told += [
                "!" * 96,
                f"THIS MODEL DOES NOT USE THE IMAGE: another record's features change its loss by {rise:+.2f} %",
                f"(one that looks at them loses {100 * (USED_FROM_RATIO - 1):.0f} % or more), so its reports hardly "
                "depend on the slide.",
                "Train longer, raise --learning_rate, or see whether the features are those of the reports.",
                "!" * 96,
            ]
        return told


def image_ablation(
    accelerator: Accelerator,
    model: nn.Module,
    tokenizer: Any,
    records: Sequence[Record],
    *,
    image_ablation_records: int,
    batch_size: int,
    num_workers: int,
    seed: int,
) -> ImageAblation | None:
    """Compare losses with right, shuffled and zero features. Collective: call on every rank.

    Args:
        accelerator: of the run.
        model: as prepared.
        tokenizer: of the language model.
        records: of validation.
        image_ablation_records: use so many of them at most, evenly spaced; 0 for no comparison.
        batch_size: records per process and forward pass.
        num_workers: reader processes.
        seed: of the choice of partners.

    Returns:
        None where none is asked for or there is nothing to compare: all records have the same input or report.
    """
    if not image_ablation_records:
        return None
    places = (
        np.linspace(0, len(records) - 1, min(image_ablation_records, len(records))).astype(int) if len(records) else []
    )
    own = [records[int(place)] for place in places]
    partners = other_records([record.turns for record in own], [record.inputs for record in own], seed)
    if partners is None:
        if accelerator.is_main_process:
            print("image ablation: not done, for want of validation records of different reports", file=sys.stderr)
        return None
    swapped = [replace(record, inputs=own[partner].inputs) for record, partner in zip(own, partners, strict=True)]

    def loader(of_records: list[Record]) -> Any:
        dataset = ReportDataset.for_model(accelerator.unwrap_model(model), tokenizer, of_records, skip_bad_inputs=True)
        batches = RecordBatches(len(dataset), batch_size, num_processes=accelerator.num_processes)
        return accelerator.prepare(make_loader(dataset, batches, num_workers))

    right = evaluation_loss(accelerator, model, loader(own))
    shuffled = evaluation_loss(accelerator, model, loader(swapped))
    zero = evaluation_loss(accelerator, model, _without_image(loader(own)))
    ratio = shuffled / right if right > 0 else math.inf
    ablation = ImageAblation(len(own), right, shuffled, zero, ratio, ratio >= USED_FROM_RATIO)
    if accelerator.is_main_process:
        print(*ablation.lines(), sep="\n", file=sys.stderr)
    return ablation


def other_records(texts: Sequence[Any], inputs: Sequence[Any], seed: int) -> list[int] | None:
    """For each record the place of another, every place once: a derangement.

    Partners differ in text wherever the commonest text has no more than half of the records, and in inputs wherever a
    few exchanges achieve it. None where all texts or all inputs are the same.
    """
    if len(set(texts)) < 2 or len(set(inputs)) < 2:
        return None
    # Sorted by text, and rotated by the size of the largest group: no group then meets itself, if it can be helped.
    order = np.random.default_rng(seed).permutation(len(texts))
    groups: dict[Any, list[int]] = {}
    for place in order.tolist():
        groups.setdefault(texts[place], []).append(place)
    ranked = [place for group in sorted(groups.values(), key=len, reverse=True) for place in group]
    shift = min(max(map(len, groups.values())), len(ranked) - 1)
    partners = [0] * len(ranked)
    for rank, place in enumerate(ranked):
        partners[place] = ranked[(rank + shift) % len(ranked)]

    def cost(place: int, partner: int) -> int:
        same_input, same_text = inputs[place] == inputs[partner], texts[place] == texts[partner]
        return 4 * (place == partner) + 2 * same_input + same_text

    for place in range(len(ranked)):
        if cost(place, partners[place]) == 0:
            continue
        before = [cost(place, partners[place]) + cost(other, partners[other]) for other in ranked]
        after = [cost(place, partners[other]) + cost(other, partners[place]) for other in ranked]
        gain, other = max((b - a, other) for b, a, other in zip(before, after, ranked, strict=True))
        if gain > 0:
            partners[place], partners[other] = partners[other], partners[place]
    return partners


def _without_image(batches: Iterable[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """The same batches with patch tokens or pixels of zeros."""
    for batch in batches:
        images = {name: torch.zeros_like(batch[name]) for name in ("patch_tokens", "pixel_values") if name in batch}
        yield batch | images
