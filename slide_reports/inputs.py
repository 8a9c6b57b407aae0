"""The feature files and images that records name: whether they open, and how they were made."""

import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from slide_features import (
    FEATURE_SUFFIXES,
    MAKING_FACTS,
    read_slide_features,
    with_unsaid,
    worth_saying,
)
from slide_reports.record import Record
from slide_reports.table import column, fields, select

NUM_ASKED = 101  # feature files asked how they were made
MAX_OPENED = 10_000  # files opened before training: some ten seconds. Of more, as many are tried, evenly spaced
MAX_PROBLEMS = 1_000  # lines kept
warnings.filterwarnings("ignore", module=r"PIL\.")  # of EXIF data, mostly; an image that does not open is told by name


def with_inputs(
    records: Sequence[Record], expected: dict[str, Any] | None = None
) -> tuple[Sequence[Record], list[str]]:
    """The records whose answers exist and whose inputs open, and a line for each other record saying what is wrong.

    Feature files must be made as ``expected`` says, or else as most of them. All inputs must be there; of more
    than `MAX_OPENED` different ones only so many are opened, and the others when they are read.
    """
    faults = input_faults(
        list(dict.fromkeys(path for (paths,) in fields(records, "inputs") for path in paths)), expected
    )
    problems, usable = [], np.zeros(len(records), dtype=bool)
    for position, (paths, of_record) in enumerate(fields(records, "inputs", "turns")):
        fault = next((faults[path] for path in paths if path in faults), None)
        if not any(answer for _, answer in of_record):
            fault = "its report is empty"
        usable[position] = fault is None
        if fault is not None and len(problems) < MAX_PROBLEMS:
            problems.append((position, fault))
    bad = select(records, [position for position, _ in problems])
    lines = [f"{name}: {fault}" for name, (_, fault) in zip(column(bad, "id"), problems, strict=True)]
    if (more := int((~usable).sum()) - len(lines)) > 0:
        lines.append(f"and {more} more records")
    return select(records, np.nonzero(usable)[0]), lines


def input_faults(paths: list[str], expected: dict[str, Any] | None) -> dict[str, str]:
    """What is wrong with each input that cannot be used, see `with_inputs`."""
    faults = {path: f"{path} is missing" for path in paths if not os.path.isfile(path)}
    present = [path for path in paths if path not in faults]
    expected = expected or _commonest_making(present)
    to_open = present[:: max(1, -(-len(present) // MAX_OPENED))]
    with ThreadPoolExecutor(8) as pool:
        jobs = pool.map(lambda path: _try_input(path, expected or {}), to_open)
        tried = tqdm(jobs, total=len(to_open), desc="checking inputs", unit="file", delay=5, leave=False)
        faults |= {path: fault for path, (fault, _) in zip(to_open, tried, strict=True) if fault is not None}
    return faults


def _commonest_making(paths: list[str]) -> dict[str, Any]:
    """How most feature files were made, of many an evenly spaced `NUM_ASKED`: one stray file speaks for no other.

    Of equally many it is the way of the first. Empty where no file opens, or images do.
    """
    for chosen in (paths[:: max(1, -(-len(paths) // NUM_ASKED))], paths):
        made = [making for fault, making in (_try_input(path, {}) for path in chosen) if fault is None]
        if made:
            return max(made, key=made.count)
    return {}


def _try_input(path: str, expected: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
    try:
        return None, check_input(Path(path), expected)
    except (ValueError, OSError) as error:
        return str(error), {}


def check_input(path: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """Open a feature file or image without reading it whole; of a feature file, return how it was made.

    Raises:
        ValueError: it does not open as what its name says, or was made otherwise than ``expected``.
        FileNotFoundError: it is missing.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    if path.name.endswith(FEATURE_SUFFIXES):
        check_making(path, expected)
        return making_of_file(path)
    try:
        Image.open(path).close()
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} does not open as an image") from error
    return {}


class _Stored(NamedTuple):
    """What is kept of a feature file once it was looked into."""

    making: dict[str, Any]
    um_per_px: float | None
    num_tiles: int


def making_of_file(path: Path) -> dict[str, Any]:
    """How a feature file was made, as far as it says and others must agree."""
    return _stored(path).making


def um_per_px_of_file(path: Path) -> float | None:
    """Microns of a level-0 pixel of a feature file's slide; files may differ in it. None if it does not say."""
    return _stored(path).um_per_px


def num_tiles_of_file(path: Path) -> int:
    """Tiles of a feature file."""
    return _stored(path).num_tiles


def _stored(path: Path) -> _Stored:
    stored = path.stat()
    return _stored_in_version(str(path), stored.st_mtime_ns, stored.st_size)


@lru_cache(maxsize=2**15)
def _stored_in_version(path: str, modified_ns: int, num_bytes: int) -> _Stored:
    """Read once of each version of a file: to read it takes as long as to read 256 patch tokens.

    What is known before training begins is known to the processes that load records, which are copies of this one.
    """
    num_tiles = 0

    def first_row(coords: np.ndarray) -> np.ndarray:
        nonlocal num_tiles
        num_tiles = len(coords)
        if not num_tiles:
            raise ValueError(f"{path} holds no tile: make it again, or leave the record out")
        return np.array([0])

    slide = read_slide_features(path, rows=first_row)
    making = {
        "patch_width": slide.features.shape[1],
        "encoder": slide.encoder,
        "encoder_fingerprint": slide.encoder_fingerprint,
        **facts_to_agree_on(slide.making),
    }
    return _Stored(making, slide.um_per_px, num_tiles)


def facts_to_agree_on(making: dict[str, Any]) -> dict[str, Any]:
    """Those of ``MAKING_FACTS`` in which files must not differ; None where it is unknown."""
    return {name: value for name, value in with_unsaid(making).items() if MAKING_FACTS[name].must_agree}


def check_making(path: Path, expected: dict[str, Any]) -> None:
    """Refuse patch tokens of another width or encoder, or of tiles made otherwise, than the others'.

    Raises:
        ValueError: names both values. What one side does not say is not compared, nor are the names of two encoders
            with fingerprints: a folder may have moved.
    """
    if not expected:
        return
    found = dict(making_of_file(path))
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
