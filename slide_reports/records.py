"""Annotation files to records, and records to splits.

Readers tell annotation files apart by their content. Every path in such a file is resolved under a root and refused
when it leaves it.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse.typing import ClosedUnitInterval, PositiveInt
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from slide_features import (
    FEATURE_SUFFIXES,
    MAKING_FACTS,
    SlideFeatures,
    read_slide_features,
    with_unsaid,
    worth_saying,
)

REG_PATIENT = re.compile(r"^(PIT_\d+_\d+)_\d+$")
TCGA_PATIENT = re.compile(r"^(TCGA-[A-Z0-9]{2}-[A-Z0-9]{4})")


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
        features_dir: folder of ``<slide_id>.h5`` (or ``.zarr.zip``, or ``.pt`` as CLAM's).
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
        found = "an empty list" if rows == [] else type(rows).__name__
        raise ValueError(f"{path}: expected a list of at least one record, found {found}")
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
    names = dict.fromkeys([slide_id, Path(record_id).stem, record_id])
    files = [_inside(path, index, Path(features_dir), name + suffix) for name in names for suffix in FEATURE_SUFFIXES]
    chosen = next((file for file in files if file.is_file()), files[0])
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
        raise ValueError(
            f"{path}: record {index} names {name[:80]!r}, which lies outside {root} (links are followed); "
            "name the folder that really holds it"
        )
    return candidate


def slide_id_of(name: str) -> str:
    """The file name of a slide without its last extension, where it has one that is not part of the identifier."""
    stem, dot, extension = name.rpartition(".")
    return stem if dot and stem and re.fullmatch(r"[A-Za-z][A-Za-z0-9]{1,6}", extension) else name


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


def records_digest(records: list[Record]) -> str:
    """SHA-256 of ids, questions and answers, in order: tells a changed annotation file."""
    digest = hashlib.sha256()
    for record in records:
        digest.update("\0".join((record.id, record.question, record.answer, "")).encode())
    return digest.hexdigest()


def with_inputs(records: list[Record], expected: dict[str, Any] | None = None) -> tuple[list[Record], list[str]]:
    """The records whose answers exist and whose inputs open, and a line for each other record saying what is wrong.

    Feature files must be made as ``expected`` says, or else as that of the first good record.
    """
    usable, problems = [], []
    for record in tqdm(records, desc="checking records", unit="record", delay=5, leave=False):
        try:
            if not record.answer:
                raise ValueError("its report is empty")
            makings = [check_input(path, expected or {}) for path in record.inputs]
        except (ValueError, OSError) as error:
            problems.append(f"{record.id}: {error}")
        else:
            expected = expected or makings[0]
            usable.append(record)
    return usable, problems


def check_input(path: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """Open a feature file or image without reading it whole; of a feature file, return how it was made.

    Raises:
        ValueError: it does not open as what its name says, or was made otherwise than ``expected``.
        FileNotFoundError: it is missing.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    if path.name.endswith(FEATURE_SUFFIXES):
        slide = read_slide_features(path, rows=np.array([0]))
        check_making(path, slide, expected)
        return making_of_slide(slide)
    try:
        Image.open(path).close()
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} does not open as an image") from error
    return {}


def making_of_slide(slide: SlideFeatures) -> dict[str, Any]:
    """How a feature file was made, as far as it says and others must agree."""
    return {
        "patch_width": slide.features.shape[1],
        "encoder": slide.encoder,
        "encoder_fingerprint": slide.encoder_fingerprint,
        **facts_to_agree_on(slide.making),
    }


def facts_to_agree_on(making: dict[str, Any]) -> dict[str, Any]:
    """Those of ``MAKING_FACTS`` in which files must not differ; None where it is unknown."""
    return {name: value for name, value in with_unsaid(making).items() if MAKING_FACTS[name].must_agree}


def check_making(path: Path, slide: SlideFeatures, expected: dict[str, Any]) -> None:
    """Refuse patch tokens of another width or encoder, or of tiles made otherwise, than the others'.

    Raises:
        ValueError: names both values. What one side does not say is not compared, nor are the names of two encoders
            with fingerprints: a folder may have moved.
    """
    found = making_of_slide(slide)
    if found["encoder_fingerprint"] and expected.get("encoder_fingerprint"):
        found["encoder"] = None
    for name, value in found.items():
        wanted = expected.get(name)
        if None not in (value, wanted) and value != wanted:
            raise ValueError(
                f"{path} was made with {name} {value or 'none'}, not {wanted or 'none'}; encode it like the others"
            )


def describe_features(path: Path) -> dict[str, Any]:
    """What ``vlm.json`` keeps of how a feature file was made, so that inference tiles and encodes alike."""
    first = read_slide_features(path, rows=np.array([0]))
    return {
        "input_kind": "features",
        "patch_width": first.features.shape[1],
        "encoder": first.encoder,
        "encoder_fingerprint": first.encoder_fingerprint,
        "tiling": worth_saying(first.making),
    }


def add_data_arguments(parser) -> None:
    """Flags about records and their inputs, the same in every training stage."""
    group = parser.add_argument_group("Data")
    group.add_argument(
        "--train_json", required=True, help="training records: REG reports, image captions or image questions"
    )
    group.add_argument("--val_json", default=None, help="validation records; default: patients split off --train_json")
    group.add_argument(
        "--val_fraction",
        type=ClosedUnitInterval,
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
        "--max_question_tokens",
        "--max_q_len",
        type=PositiveInt,
        default=None,
        help="longer questions lose their end; default: 128, in stage 2 as in stage 1",
    )
    group.add_argument(
        "--max_answer_tokens",
        "--max_a_len",
        type=PositiveInt,
        default=None,
        help="longer answers lose their end; default: 512, in stage 2 as in stage 1",
    )


def read_training_records(
    train_json: str,
    val_json: str | None,
    *,
    features_dir: str | None,
    image_root: str | None,
    val_fraction: float,
    seed: int,
    expected: dict[str, Any] | None = None,
) -> tuple[list[Record], list[Record], list[str]]:
    """Training records, validation records, and a line for each record left out because something of it is missing.

    Validation is ``val_json``, else the records whose split says ``val``, else patients split off. ``expected`` says
    how feature files must have been made, as for :func:`with_inputs`.

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
    train, problems = with_inputs(train, expected)
    if train and not expected:
        expected = check_input(train[0].inputs[0], {})
    val, val_problems = with_inputs(val, expected)
    if not train:
        found = f" ({problems[0]})" if problems else ""
        raise ValueError(f"{train_json}: no record to train on{found}; check --features_dir or --image_root")
    return train, val, problems + val_problems
