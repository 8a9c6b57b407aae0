"""Records to samples to batches: patch choice, labels, dynamic padding, loaders."""

import hashlib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from image_encoder import ImageEncoder
from projectors import PROMPT_TOPK
from slide_reports.cases import read_case, read_images
from slide_reports.inputs import facts_to_agree_on
from slide_reports.lengths import record_lengths
from slide_reports.prompt import Prompt
from slide_reports.record import Record
from slide_reports.record_batches import RecordBatches, SampleKey
from slide_reports.table import fields
from slide_reports.transfer import SendingCollate
from slide_vlm import IGNORED_LABEL, SlideVLM
from vlm_settings import VLMSettings

WHOLE_BUDGET_REDUCERS = ("perceiver", "qformer")  # which give as many visual tokens of a slide with fewer tiles
MAX_PATCHES = 16384  # read of one slide when a reducer other than `none` follows; 50 MB at width 1536


@dataclass
class ReportDataset(Dataset):
    """Records as model inputs, looked up by :class:`SampleKey`.

    Attributes:
        tokenizer: of the language model.
        prompt: the text around image, question and answer.
        question: asked where a record has none.
        num_patches: patch tokens read of a case at most.
        seed: of the random choice of patches; None chooses them evenly spaced, as in evaluation.
        image_transform: ``PIL.Image -> (3, height, width)`` tensor where inputs are images, else None.
        expected: how feature files must have been made, as :func:`making_of` says it of the model's.
        patches_per_image: patch tokens that the encoder gives of an image; None where that is unknown.
        num_visual_tokens: shared by the slides or images of a case; None for as many as ``num_patches``.
        cases: a number for each record, the same for records of the same slides or images; patches are then drawn for
            the case, not for the record, and samples say their case, so that they are packed. None for neither.
        skip_bad_inputs: put a filler in the place of a record whose input cannot be read, and say so; else raise.
    """

    records: Sequence[Record]
    tokenizer: Any
    prompt: Prompt
    question: str
    num_patches: int
    max_question_tokens: int = 128
    max_answer_tokens: int = 512
    seed: int | None = None
    image_transform: Any = None
    expected: dict[str, Any] | None = None
    patches_per_image: int | None = None
    num_visual_tokens: int | None = None
    cases: np.ndarray | None = None
    skip_bad_inputs: bool = False

    @classmethod
    def for_model(
        cls,
        model: SlideVLM,
        tokenizer: Any,
        records: Sequence[Record],
        *,
        seed: int | None = None,
        skip_bad_inputs: bool = False,
        packing: bool = False,
    ) -> "ReportDataset":
        """Dataset that prepares records as the model's settings say, for rows of several records if asked."""
        settings = model.settings
        has_grid = model.encoder is not None and model.encoder.patch_grid is not None
        return cls(
            records,
            tokenizer,
            Prompt(**settings.prompt),
            settings.question,
            num_patches=patch_budget(settings),
            max_question_tokens=settings.max_question_tokens,
            max_answer_tokens=settings.max_answer_tokens,
            seed=seed,
            image_transform=model.encoder.transform if model.encoder is not None else None,
            expected=making_of(settings),
            patches_per_image=math.prod(model.encoder.patch_grid) if has_grid else None,
            num_visual_tokens=settings.num_visual_tokens,
            cases=case_numbers(records, apart=settings.token_reducer == PROMPT_TOPK) if packing else None,
            skip_bad_inputs=skip_bad_inputs,
        )

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        """Token ids and labels (T,), the first question's ids, and what :func:`read_case` or :func:`read_images` gives.

        Raises:
            ValueError: the input cannot be read; with ``skip_bad_inputs``, no input can.
        """
        for tried in range(len(self)):
            index = (key.index + tried) % len(self)
            record = self.records[index]
            try:
                inputs = self._inputs(record, index, key.epoch)
            except (ValueError, OSError) as error:
                if not self.skip_bad_inputs:
                    raise
                print(f"left out of epoch {key.epoch + 1}: {record.id}: {error}", file=sys.stderr)
            else:
                about = {"is_bad": bool(tried)} | ({} if self.cases is None else {"case_id": int(self.cases[index])})
                return self._text(record, supervised=key.supervised and not tried) | inputs | about
        raise ValueError("no record's input can be read; see the messages above")

    def lengths(self, token_reducer: str) -> np.ndarray:
        """Tokens of each record to the language model, (N,) int32, as far as is known without reading its inputs."""
        return record_lengths(
            self.records,
            self.tokenizer,
            self.prompt,
            self.question,
            max_question_tokens=self.max_question_tokens,
            max_answer_tokens=self.max_answer_tokens,
            num_visual_tokens=self.num_visual_tokens or self.num_patches,
            tiles_bound_tokens=self.image_transform is None and token_reducer not in WHOLE_BUDGET_REDUCERS,
        )

    def _text(self, record: Record, *, supervised: bool) -> dict[str, list[int]]:
        """Ids and labels of all turns; every answer is supervised, whichever turn it is of."""
        question = record.question or self.question
        bare_ids = self.prompt.bare_question_ids(self.tokenizer, question, self.max_question_tokens)
        ids = self.prompt.question_ids(self.tokenizer, question, self.max_question_tokens, len(record.inputs))
        labels = [IGNORED_LABEL] * len(ids)
        for number, (question, text) in enumerate(record.turns):
            if number:
                asked = self.prompt.next_question_ids(self.tokenizer, question, self.max_question_tokens)
                ids, labels = ids + asked, labels + [IGNORED_LABEL] * len(asked)
            if text:
                answer = self.prompt.answer_ids(self.tokenizer, text, self.max_answer_tokens)
                ids, labels = ids + answer, labels + (answer if supervised else [IGNORED_LABEL] * len(answer))
        return {"input_ids": ids, "labels": labels, "question_ids": bare_ids}

    def _inputs(self, record: Record, index: int, epoch: int) -> dict[str, Any]:
        """What is drawn depends on seed, epoch and the record's place alone, whichever process and worker reads it."""
        drawn_for = index if self.cases is None else int(self.cases[index])
        rng = None if self.seed is None else np.random.default_rng([self.seed, epoch, drawn_for])
        budgets = {"num_patches": self.num_patches, "num_visual_tokens": self.num_visual_tokens or self.num_patches}
        if self.image_transform is None:
            return read_case(record.inputs, **budgets, rng=rng, expected=self.expected)
        return read_images(
            record.inputs, self.image_transform, **budgets, rng=rng, patches_per_image=self.patches_per_image
        )


def case_numbers(records: Sequence[Record], *, apart: bool = False) -> np.ndarray:
    """For each record, the place of the first record with the same inputs, (N,) int64; its own if all stand apart."""
    if apart:
        return np.arange(len(records))
    first: dict[bytes, int] = {}
    digests = (hashlib.sha256("\0".join(paths).encode()).digest() for (paths,) in fields(records, "inputs"))
    return np.array([first.setdefault(digest, place) for place, digest in enumerate(digests)], dtype=np.int64)


def making_of(settings: VLMSettings) -> dict[str, Any]:
    """How the feature files of a model must have been made, as far as its settings know."""
    names = ("patch_width", "encoder", "encoder_fingerprint")
    return {name: getattr(settings, name) for name in names} | facts_to_agree_on(settings.tiling)


def check_input_kind(model: str, settings: VLMSettings, image_root: str | None) -> None:
    """Refuse to give images to a model of slides, or the reverse.

    Raises:
        ValueError: names the flag that would do.
    """
    if (settings.input_kind == "images") != bool(image_root):
        flag = "--image_root" if settings.input_kind == "images" else "--features_dir"
        raise ValueError(f"{model} was trained on {settings.input_kind}; give {flag}")


def patch_budget(settings: VLMSettings) -> int:
    """Patch tokens to read of a case: the visual tokens themselves without a reducer, else as many as are useful."""
    return settings.num_visual_tokens if settings.token_reducer == "none" else MAX_PATCHES


def default_num_visual_tokens(encoder: ImageEncoder | None) -> int:
    """All patch tokens of an image; 256 of a slide."""
    return math.prod(encoder.patch_grid) if encoder is not None and encoder.patch_grid else 256


def describe_encoder(encoder: ImageEncoder) -> dict[str, Any]:
    """The same of an image encoder that is part of the model."""
    return {
        "input_kind": "images",
        "patch_width": encoder.patch_width,
        "encoder": encoder.name,
        "encoder_fingerprint": encoder.fingerprint(),
    }


def collate(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Pad samples to the longest of this batch: token ids, labels and patch tokens each to their own longest."""
    batch = {"is_bad": torch.tensor([sample.get("is_bad", False) for sample in samples])}
    ids = [torch.tensor(sample["input_ids"]) for sample in samples]
    labels = [torch.tensor(sample["labels"]) for sample in samples]
    pad = torch.nn.utils.rnn.pad_sequence
    batch["input_ids"] = pad(ids, batch_first=True, padding_value=0)
    batch["labels"] = pad(labels, batch_first=True, padding_value=IGNORED_LABEL)
    batch["attention_mask"] = pad([torch.ones_like(row) for row in ids], batch_first=True, padding_value=0)
    if "case_id" in samples[0]:
        batch["case_ids"] = torch.tensor([sample["case_id"] for sample in samples])
    if "question_ids" in samples[0]:
        questions = [torch.tensor(sample["question_ids"], dtype=torch.long) for sample in samples]
        batch["question_ids"] = pad(questions, batch_first=True, padding_value=0)
        batch["question_mask"] = pad([torch.ones_like(row).bool() for row in questions], batch_first=True)
    # The slides or images of all cases follow one another, in the order of their markers.
    batch["visual_budgets"] = torch.cat([sample["visual_budgets"] for sample in samples])
    if "pixel_values" in samples[0]:
        batch["pixel_values"] = torch.cat([sample["pixel_values"] for sample in samples])
        if "chosen_patches" in samples[0]:
            chosen = [rows for sample in samples for rows in sample["chosen_patches"]]
            batch["chosen_patches"] = pad(chosen, batch_first=True, padding_value=-1)
        return batch
    for name in ("patch_tokens", "coords"):
        parts = [part for sample in samples for part in sample[name]]
        widest = reduce(torch.promote_types, {part.dtype for part in parts})
        batch[name] = pad([part.to(widest) for part in parts], batch_first=True)
    masks = [torch.ones(len(part), dtype=torch.bool) for sample in samples for part in sample["coords"]]
    batch["patch_mask"] = pad(masks, batch_first=True, padding_value=False)
    if "um_per_px" in samples[0]:
        batch["um_per_px"] = torch.cat([sample["um_per_px"] for sample in samples])
    return batch


# The flags that :func:`make_loaders` takes.
LOADER_FLAGS = ("batch_size", "gradient_accumulation_steps", "num_workers", "seed", "random_batches", "packing")


def make_loaders(
    model: SlideVLM,
    tokenizer: Any,
    train_records: Sequence[Record],
    val_records: Sequence[Record],
    num_processes: int,
    *,
    batch_size: int,
    gradient_accumulation_steps: int,
    num_workers: int,
    seed: int,
    random_batches: bool = False,
    packing: bool = False,
) -> tuple[RecordBatches, DataLoader, DataLoader]:
    """Training batches, which are told where to begin each epoch, and the loaders of training and validation.

    Training shuffles records and draws patches at random; validation does neither. Both leave bad inputs out, and both
    put records of like length together, unless ``random_batches``, or with ``packing`` those of one case.

    Raises:
        ValueError: packing would not be exact with this language model.
    """
    if packing:
        model.check_packing()
    preparing = {"skip_bad_inputs": True, "packing": packing}
    train_data = ReportDataset.for_model(model, tokenizer, train_records, seed=seed, **preparing)
    val_data = ReportDataset.for_model(model, tokenizer, val_records, **preparing)

    def alike(data: ReportDataset) -> dict[str, np.ndarray | None]:
        wanted = not (packing or random_batches)
        return {"lengths": data.lengths(model.settings.token_reducer) if wanted else None, "cases": data.cases}

    train_batches = RecordBatches(
        len(train_data),
        batch_size,
        num_processes=num_processes,
        gradient_accumulation_steps=gradient_accumulation_steps,
        shuffle=True,
        seed=seed,
        **alike(train_data),
    )
    val_batches = RecordBatches(len(val_data), batch_size, num_processes=num_processes, **alike(val_data))
    return (
        train_batches,
        make_loader(train_data, train_batches, num_workers),
        make_loader(val_data, val_batches, num_workers),
    )


def make_loader(dataset: ReportDataset, batches: RecordBatches, num_workers: int = 0) -> DataLoader:
    """Loader with a random generator of its own, so that making an iterator leaves the global one as it was."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=SendingCollate(collate, num_workers),
        num_workers=num_workers,
        generator=torch.Generator().manual_seed(0),
        pin_memory=torch.cuda.is_available(),
    )
