"""Annotation files to records to batches: readers, splits, prompt, dataset, batch sampler and collator.

A record is one question and answer about one case. Readers tell annotation files apart by their content; every path in
such a file is resolved under a root and refused when it leaves it.
"""

import hashlib
import json
import math
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from slide_features import SlideFeatures, choose_patches, raster_order, read_slide_features, read_slide_positions
from slide_vlm import IGNORED_LABEL, IMAGE_MARKER, SlideVLM, VLMSettings

DEFAULT_QUESTIONS = {"features": "Write the pathology report of this slide.", "images": "Describe this image."}
REG_PATIENT = re.compile(r"^(PIT_\d+_\d+)_\d+$")
TCGA_PATIENT = re.compile(r"^(TCGA-[A-Z0-9]{2}-[A-Z0-9]{4})")
MAX_PATCHES = 16384  # read of one slide when a reducer other than `none` follows; 50 MB at width 1536


# Records


@dataclass(frozen=True)
class Record:
    """One question and its answer about one case.

    Attributes:
        id: as the annotation file names it; predictions carry it.
        inputs: feature files or images of the case.
        question: empty where the file has none; the model's default question is asked then.
        answer: the report; empty where only predictions are wanted.
        group: the patient. All records of a group fall in the same split.
        split: ``train``, ``val`` or ``test`` where the file says so, else empty.
    """

    id: str
    inputs: tuple[Path, ...]
    question: str
    answer: str
    group: str
    split: str = ""


def read_records(
    annotation: str | Path, *, features_dir: str | Path | None = None, image_root: str | Path | None = None
) -> list[Record]:
    """Read an annotation file in any known form.

    Known forms: REG 2025 ``[{"id", "report"}]`` (``features_dir``), image captions ``[{"image", "caption"}]`` and image
    questions ``[{"image", "problem", "normal_caption"}]`` (``image_root``).

    Args:
        annotation: JSON file.
        features_dir: folder of ``<slide_id>.h5`` (or CLAM's ``.pt``).
        image_root: folder that ``image`` is relative to.

    Raises:
        FileNotFoundError: no such annotation file or root.
        ValueError: the form is unknown or a record is broken; names the file, the record and the mend.
    """
    path = Path(annotation)
    rows = _read_json_list(path)
    for name, root in (("--features_dir", features_dir), ("--image_root", image_root)):
        if root is not None and not Path(root).is_dir():
            raise FileNotFoundError(f"{name} {root}: no such folder")
    first = rows[0]
    if {"image", "problem"} <= first.keys():
        return [_image_record(path, i, row, image_root, "problem", "normal_caption") for i, row in enumerate(rows)]
    if {"image", "caption"} <= first.keys():
        return [_image_record(path, i, row, image_root, None, "caption") for i, row in enumerate(rows)]
    if "id" in first:
        return [_report_record(path, i, row, features_dir) for i, row in enumerate(rows)]
    raise ValueError(
        f"{path}: unknown form, its first record has the keys {', '.join(sorted(first)) or 'none'}; expected id and "
        "report, image and caption, or image, problem and normal_caption"
    )


def _read_json_list(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such annotation file")
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON in UTF-8 ({error}); mend or export it again") from error
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path}: expected a list of at least one record, found {type(rows).__name__}")
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{path}: record {index} is a {type(row).__name__}; expected an object with named values")
    return rows


def _text(path: Path, index: int, row: dict[str, Any], key: str, default: str | None = None) -> str:
    value = row.get(key, default)
    if not isinstance(value, str) or (default is None and not value.strip()):
        found = "nothing" if key not in row else repr(value)[:60]
        name = str(row.get("id", row.get("image", "?")))[:60]
        raise ValueError(f"{path}: record {index} ({name}) has {found} under {key!r}; expected text")
    return value


def _report_record(path: Path, index: int, row: dict[str, Any], features_dir: str | Path | None) -> Record:
    if features_dir is None:
        raise ValueError(f"{path}: holds slide reports; give the folder of feature files with --features_dir")
    record_id = _text(path, index, row, "id")
    slide_id = slide_id_of(record_id)
    features = [_inside(path, index, Path(features_dir), slide_id + extension) for extension in (".h5", ".pt")]
    chosen = next((file for file in features if file.is_file()), features[0])
    answer = _text(path, index, row, "report", default="").strip()
    question = _text(path, index, row, "question", default="")
    return Record(
        record_id, (chosen,), question, answer, patient_of(slide_id), _text(path, index, row, "split", default="")
    )


def _image_record(
    path: Path,
    index: int,
    row: dict[str, Any],
    image_root: str | Path | None,
    question_key: str | None,
    answer_key: str,
) -> Record:
    if image_root is None:
        raise ValueError(f"{path}: holds images; give the folder that they are in with --image_root")
    name = _text(path, index, row, "image")
    image = _inside(path, index, Path(image_root), name)
    question = _text(path, index, row, question_key) if question_key else ""
    record_id = str(row.get("id", name))
    group = str(row.get("patient_id", patient_of(Path(name).stem)))
    answer = _text(path, index, row, answer_key, default="").strip()
    return Record(record_id, (image,), question, answer, group, _text(path, index, row, "split", default=""))


def _inside(path: Path, index: int, root: Path, name: str) -> Path:
    """``root / name``, refused when it lies outside ``root``, also through links."""
    candidate = root / name
    if "\0" in name or not candidate.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{path}: record {index} names {name[:80]!r}, which lies outside {root}; use a path below it")
    return candidate


def slide_id_of(name: str) -> str:
    """The file name of a slide without its last extension, where it has one that is not part of the identifier."""
    stem, dot, extension = name.rpartition(".")
    return stem if dot and stem and re.fullmatch(r"[A-Za-z][A-Za-z0-9]{1,4}", extension) else name


def patient_of(slide_id: str) -> str:
    """The patient of a REG (``PIT_<centre>_<patient>_<slide>``) or TCGA slide; any other slide is its own patient."""
    match = REG_PATIENT.match(slide_id) or TCGA_PATIENT.match(slide_id)
    return match.group(1) if match else slide_id


def split_by_patient(records: list[Record], fraction: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Split off about ``fraction`` of the patients: (the others, those split off).

    A patient's side depends on its name and the seed alone, so it stays when records are added.
    """

    def position(group: str) -> float:
        return int.from_bytes(hashlib.sha256(f"{seed}:{group}".encode()).digest()[:8], "big") / 2**64

    groups = {record.group for record in records}
    held_out = {group for group in groups if position(group) < fraction}
    if not held_out and fraction > 0 and len(groups) > 1:
        held_out = {min(groups, key=position)}  # a small corpus still gets a validation loss
    return [r for r in records if r.group not in held_out], [r for r in records if r.group in held_out]


def with_inputs(records: list[Record]) -> tuple[list[Record], list[str]]:
    """The records whose inputs and answers exist, and a line for each other record saying what is missing."""
    usable, problems = [], []
    for record in records:
        missing = next((path for path in record.inputs if not path.is_file()), None)
        if missing is not None:
            problems.append(f"{record.id}: {missing} is missing")
        elif not record.answer:
            problems.append(f"{record.id}: its report is empty")
        else:
            usable.append(record)
    return usable, problems


def add_data_arguments(parser) -> None:
    """Flags about records and their inputs, the same in every training stage."""
    group = parser.add_argument_group("Data")
    group.add_argument(
        "--train_json", required=True, help="training records: REG reports, image captions or image questions"
    )
    group.add_argument("--val_json", default=None, help="validation records; default: patients split off --train_json")
    group.add_argument(
        "--val_fraction",
        type=float,
        default=0.1,
        help="share of patients to split off without --val_json; 0 for no validation",
    )
    group.add_argument("--features_dir", default=None, help="folder of stage 0's <slide_id>.h5, for slide reports")
    group.add_argument(
        "--image_root", default=None, help="folder that `image` in the records is relative to, for images"
    )
    group.add_argument(
        "--question", default=None, help="asked where a record has no question; default: one for slides, one for images"
    )
    group.add_argument(
        "--max_question_tokens", "--max_q_len", type=int, default=128, help="longer questions lose their end"
    )
    group.add_argument(
        "--max_answer_tokens", "--max_a_len", type=int, default=512, help="longer answers lose their end"
    )


def read_training_records(
    train_json: str,
    val_json: str | None,
    *,
    features_dir: str | None,
    image_root: str | None,
    val_fraction: float,
    seed: int,
) -> tuple[list[Record], list[Record], list[str]]:
    """Training records, validation records, and a line for each record left out because something of it is missing.

    Validation is ``val_json``, else the records whose split says ``val``, else patients split off.

    Raises:
        FileNotFoundError: an annotation file or folder is missing.
        ValueError: an annotation file is broken, or no record is left to train on.
    """
    where = {"features_dir": features_dir, "image_root": image_root}
    records = read_records(train_json, **where)
    if val_json:
        train, val = [r for r in records if r.split in ("", "train")], read_records(val_json, **where)
    elif any(record.split for record in records):
        train, val = ([r for r in records if r.split == split] for split in ("train", "val"))
    else:
        train, val = split_by_patient(records, val_fraction, seed)
    train, problems = with_inputs(train)
    val, val_problems = with_inputs(val)
    if not train:
        found = f" ({problems[0]})" if problems else ""
        raise ValueError(f"{train_json}: no record to train on{found}; check --features_dir or --image_root")
    return train, val, problems + val_problems


# Prompt


@dataclass(frozen=True)
class Prompt:
    """The text around an image, a question and an answer, as literal strings that ``vlm.json`` keeps.

    ``before_image`` <image> ``after_image`` (with ``{question}``) answer ``after_answer``
    """

    before_image: str
    after_image: str
    after_answer: str

    @classmethod
    def for_tokenizer(cls, tokenizer) -> "Prompt":
        """From the tokenizer's chat template where it has one, else a plain layout."""
        bos, eos = tokenizer.bos_token or "", tokenizer.eos_token or ""
        if not tokenizer.chat_template:
            return cls(bos, "\n{question}\n", eos)
        image, question, answer = "<|image|>", "<|question|>", "<|answer|>"
        turn = [{"role": "user", "content": f"{image}\n{question}"}]
        asked = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        told = tokenizer.apply_chat_template([*turn, {"role": "assistant", "content": answer}], tokenize=False)
        before_image, rest = asked.split(image)
        before_question, after_question = rest.split(question)
        after_image = _escape(before_question) + "{question}" + _escape(after_question)
        # Templates end with a newline that no model needs to be taught.
        return cls(before_image, after_image, told.split(answer)[1].rstrip() or eos)

    def question_ids(self, tokenizer, question: str, max_question_tokens: int) -> list[int]:
        """Ids up to the answer, with :data:`IMAGE_MARKER` for the image; a long question loses its end."""
        ids = tokenizer(question, add_special_tokens=False)["input_ids"]
        if len(ids) > max_question_tokens:
            question = tokenizer.decode(ids[:max_question_tokens])
        before = tokenizer(self.before_image, add_special_tokens=False)["input_ids"]
        after = tokenizer(self.after_image.format(question=question), add_special_tokens=False)["input_ids"]
        return [*before, IMAGE_MARKER, *after]

    def answer_ids(self, tokenizer, answer: str, max_answer_tokens: int) -> list[int]:
        """Ids of the answer and its end; a long answer loses its end, and then has no end token to learn."""
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        if len(ids) > max_answer_tokens:
            return ids[:max_answer_tokens]
        return ids + tokenizer(self.after_answer, add_special_tokens=False)["input_ids"]

    def stop_ids(self, tokenizer, llm) -> list[int]:
        """Ids that end an answer in generation."""
        end = tokenizer(self.after_answer, add_special_tokens=False)["input_ids"][:1]
        configured = llm.generation_config.eos_token_id
        configured = configured if isinstance(configured, list) else [configured]
        return sorted({i for i in [*end, *configured, tokenizer.eos_token_id] if i is not None})


def _escape(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


# Dataset and batches


class SampleKey(NamedTuple):
    """What the sampler asks the dataset for. A filler (``supervised`` False) evens out batches and teaches nothing."""

    index: int
    epoch: int
    supervised: bool


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
    """

    records: list[Record]
    tokenizer: Any
    prompt: Prompt
    question: str
    num_patches: int
    max_question_tokens: int = 128
    max_answer_tokens: int = 512
    seed: int | None = None
    image_transform: Any = None
    patch_width: int | None = None

    @classmethod
    def for_model(
        cls, model: SlideVLM, tokenizer: Any, records: list[Record], seed: int | None = None
    ) -> "ReportDataset":
        """Dataset that prepares records as the model's settings say."""
        settings = model.settings
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
            patch_width=settings.patch_width,
        )

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        """Token ids and labels (T,), and ``pixel_values`` (M, 3, height, width) or what :func:`read_case` gives."""
        record = self.records[key.index]
        question = self.prompt.question_ids(self.tokenizer, record.question or self.question, self.max_question_tokens)
        answer = self.prompt.answer_ids(self.tokenizer, record.answer, self.max_answer_tokens) if record.answer else []
        labels = [IGNORED_LABEL] * len(question) + (answer if key.supervised else [IGNORED_LABEL] * len(answer))
        return {"input_ids": question + answer, "labels": labels, **self._inputs(record, key.epoch)}

    def _inputs(self, record: Record, epoch: int) -> dict[str, Any]:
        if self.image_transform is not None:
            return {"pixel_values": torch.stack([read_image(path, self.image_transform) for path in record.inputs])}
        rng = None
        if self.seed is not None:
            rng = np.random.default_rng([self.seed, epoch, zlib.crc32(record.id.encode())])
        return read_case(record.inputs, self.num_patches, rng, self.patch_width)


def patch_budget(settings: VLMSettings) -> int:
    """Patch tokens to read of a case: the visual tokens themselves without a reducer, else as many as are useful."""
    return settings.num_visual_tokens if settings.token_reducer == "none" else MAX_PATCHES


def read_case(
    paths: tuple[Path, ...], num_patches: int, rng: np.random.Generator | None = None, patch_width: int | None = None
) -> dict[str, Tensor]:
    """Patch tokens of a case's slides, side by side, in raster order: ``patch_tokens`` (N, E), ``coords`` (N, 2) int64.

    The budget is shared equally by the slides; ``rng`` chooses patches at random, None evenly spaced.

    Raises:
        ValueError: a slide without patches, or of another width than ``patch_width``.
    """
    tokens, coords, offset = [], [], 0
    for path in paths:
        positions = read_slide_positions(path)
        if not len(positions):
            raise ValueError(f"{path}: holds no patch token; leave this slide out")
        order = raster_order(positions)
        chosen = order[choose_patches(len(order), max(1, num_patches // len(paths)), rng)]
        by_row = np.argsort(chosen, kind="stable")  # files are read in rising row order, and put in raster order after
        part = read_slide_features(path, rows=chosen[by_row])
        if patch_width is not None and part.features.shape[1] != patch_width:
            found = part.features.shape[1]
            raise ValueError(f"{path}: patch tokens are {found} wide, the model takes {patch_width}; encode it again")
        back = np.argsort(by_row, kind="stable")
        tokens.append(part.features[back])
        coords.append(part.coords[back] + [offset, 0])
        offset = int(coords[-1][:, 0].max()) + 1
    return {
        "patch_tokens": torch.from_numpy(np.concatenate(tokens).astype(np.float32)),
        "coords": torch.from_numpy(np.concatenate(coords).astype(np.int64)),
    }


def case_of_slide(slide: SlideFeatures, num_patches: int) -> dict[str, Tensor]:
    """The same from a slide's features in memory, its patches chosen evenly spaced."""
    order = raster_order(slide.coords)
    chosen = order[choose_patches(len(order), num_patches)]
    return {
        "patch_tokens": torch.from_numpy(slide.features[chosen].astype(np.float32)),
        "coords": torch.from_numpy(slide.coords[chosen].astype(np.int64)),
    }


def describe_features(path: Path) -> tuple[int, str | None, dict[str, Any]]:
    """Width, encoder and tiling settings of a feature file, for ``vlm.json``: inference tiles and encodes alike."""
    first = read_slide_features(path, rows=np.array([0]))
    tiling = {name: getattr(first, name) for name in ("tile_size", "mpp", "overlap", "min_tissue")}
    return first.features.shape[1], first.encoder, {key: value for key, value in tiling.items() if value is not None}


def read_image(path: Path, transform: Any) -> Tensor:
    """Open an image file and apply the encoder's transform: (3, height, width) float32.

    Raises:
        ValueError: the file does not open as an image.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return transform(image.convert("RGB"))
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: does not open as an image ({error}); replace it or leave the record out") from error


class RecordBatches(Sampler[list[SampleKey]]):
    """Micro-batches of all processes in order; process p of P takes every P-th.

    Every record comes exactly once an epoch. The last window of an epoch is shared out evenly over its micro-batches,
    and one that stays empty gets a filler, so every process sees the same number of micro-batches and none is dropped
    or repeated. The order depends on the seed and the epoch alone.
    """

    # Accelerate cuts or repeats batches by an integer batch_size; None leaves them as they are.
    batch_size = None
    drop_last = False

    def __init__(
        self,
        num_records: int,
        batch_size: int,
        *,
        num_processes: int = 1,
        gradient_accumulation_steps: int = 1,
        shuffle: bool = False,
        seed: int = 0,
    ):
        self.num_records = num_records
        self.records_per_batch = batch_size
        self.window = num_processes * gradient_accumulation_steps
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0
        self.first_step = 0

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return math.ceil(self.num_records / (self.records_per_batch * self.window))

    def start_at(self, epoch: int, first_step: int = 0) -> None:
        """Choose the epoch, and the step in it to begin with when a run resumes.

        Not named ``set_epoch``: Accelerate calls a method of that name with a count of its own.
        """
        self.epoch = epoch
        self.first_step = first_step

    def __len__(self) -> int:
        return (self.steps_per_epoch - self.first_step) * self.window

    def __iter__(self) -> Iterator[list[SampleKey]]:
        order = np.arange(self.num_records)
        if self.shuffle:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(self.num_records)
        records_per_step = self.records_per_batch * self.window
        for step in range(self.first_step, self.steps_per_epoch):
            of_step = order[step * records_per_step : (step + 1) * records_per_step]
            for part in np.array_split(of_step, self.window):
                keys = [SampleKey(int(index), self.epoch, True) for index in part]
                yield keys or [SampleKey(int(of_step[0]), self.epoch, False)]


def collate(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Pad samples to the longest of this batch: token ids, labels and patch tokens each to their own longest."""
    batch: dict[str, Tensor] = {}
    ids = [torch.tensor(sample["input_ids"]) for sample in samples]
    labels = [torch.tensor(sample["labels"]) for sample in samples]
    pad = torch.nn.utils.rnn.pad_sequence
    batch["input_ids"] = pad(ids, batch_first=True, padding_value=0)
    batch["labels"] = pad(labels, batch_first=True, padding_value=IGNORED_LABEL)
    batch["attention_mask"] = pad([torch.ones_like(row) for row in ids], batch_first=True, padding_value=0)
    if "pixel_values" in samples[0]:
        images = [sample["pixel_values"] for sample in samples]
        batch["pixel_values"] = pad(images, batch_first=True)
        batch["image_mask"] = pad([torch.ones(len(row), dtype=torch.bool) for row in images], batch_first=True)
        return batch
    for name in ("patch_tokens", "coords"):
        batch[name] = pad([sample[name] for sample in samples], batch_first=True)
    masks = [torch.ones(len(sample["coords"]), dtype=torch.bool) for sample in samples]
    batch["patch_mask"] = pad(masks, batch_first=True, padding_value=False)
    return batch


def make_loader(dataset: ReportDataset, batches: RecordBatches, num_workers: int = 0) -> DataLoader:
    """Loader with a random generator of its own, so that making an iterator leaves the global one as it was."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=num_workers,
        generator=torch.Generator().manual_seed(0),
        pin_memory=torch.cuda.is_available(),
    )
