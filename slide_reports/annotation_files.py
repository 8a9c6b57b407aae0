"""Annotation files to rows: JSON, JSON lines, CSV, Parquet, and what the library `datasets` opens.

A row is what the file holds of one record, as a dictionary. Rows come one by one: a file of a million records never
stands in memory as a million dictionaries.
"""

import csv
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from command_line import first_line
from csv_separator import separator_of
from slide_features import atomic_path

SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val"}
SPLITS |= {"test": "test", "testing": "test"}
NESTED_FIELDS = {"conversations", "messages", "chain-of-thought", "chain_of_thought", "image", "images", "image_path"}
NESTED_FIELDS |= {"slides", "Choice"}
# of which a record has at least one, and no set of splits
RECORD_FIELDS = {"id", "Id", "slide_id", "h5_path", "image", "images", "image_path", "conversations", "messages"}
BLANKS = re.compile(r"\s*")
LINE_ENDS = re.compile(r"\r\n|\n|\r")  # others, as U+2028, may stand within the texts of JSON
FILE_SUFFIXES = {".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt"}
PACKED = {b"PK\x03\x04": "a workbook of Excel or another zip", b"\x1f\x8b": "packed by gzip"}
SEPARATOR_NAMES = {",": "commas", ";": "semicolons", "\t": "tabs"}
TABLE_SEPARATORS = {".csv": None, ".tsv": "\t"}  # None: as its header says


class Row(NamedTuple):
    """One row of an annotation file.

    Attributes:
        where: for messages: the file and the record's place in it, counted from 0.
        split: `train`, `val` or `test` where the place in the file says so, else empty.
        values: its fields.
    """

    where: str
    split: str
    values: dict[str, Any]


def read_rows(annotation: str | Path) -> Iterator[Row]:
    """Read the rows of an annotation file, saved dataset folder, or dataset on the hub.

    Raises:
        FileNotFoundError: there is nothing of this name.
        ValueError: it is broken; names the file, the record and the mend. Raised when that place is reached.
    """
    path = Path(annotation)
    if path.is_dir() or not path.exists():
        yield from _dataset_rows(str(annotation))
    elif path.suffix.lower() in TABLE_SEPARATORS:
        yield from _table_rows(path, TABLE_SEPARATORS[path.suffix.lower()])
    elif path.suffix.lower() == ".parquet":
        yield from _parquet_rows(path)
    else:
        yield from _json_rows(path)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, a byte order mark left out.

    Raises:
        ValueError: it is in another encoding, packed, or empty.
    """
    with path.open("rb") as file:
        start = file.read(4)
    packed = next((kind for magic, kind in PACKED.items() if start.startswith(magic)), None)
    if packed:
        raise ValueError(f"{path}: {packed}, not JSON, CSV or Parquet; unpack it, or export it as one of these")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not valid JSON in UTF-8 (byte {error.start} is {error.object[error.start]:#x}); save it as UTF-8"
        ) from error
    if not text.strip():
        raise ValueError(f"{path}: not valid JSON in UTF-8 (it is empty); export it again")
    return text


def decode_json(path: Path, text: str, start: int, what: str) -> tuple[Any, int]:
    """Decode the JSON value at `start` (blanks skipped); the value and where it ends.

    Raises:
        ValueError: it is broken, not finite, or names one key twice; names `what` and the line.
    """
    start = BLANKS.match(text, start).end()
    try:
        return _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"{path}: {what} is not valid JSON ({error.msg}: {place}); mend or export it again") from error
    except RecursionError as error:
        raise ValueError(f"{path}: {what} is nested too deeply; expected fields with text") from error
    except _BadValue as error:
        raise ValueError(f"{path}: {what} {error}") from error
    except ValueError as error:  # Python reads no number of thousands of digits
        raise ValueError(f"{path}: {what} is not valid JSON (a number is too long); mend or export it again") from error


def split_of(name: object) -> str:
    """`train`, `val` or `test` for a name of a split.

    Raises:
        ValueError: the name is none that is known.
    """
    split = SPLITS.get(name.strip().lower()) if isinstance(name, str) else None
    if split is None:
        known = ", ".join(sorted(SPLITS))
        raise ValueError(f"{name!r} is no split; expected one of {known}")
    return split


class _BadValue(ValueError):
    """Valid JSON that means trouble."""


def _no_double_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        seen: set[str] = set()
        double = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise _BadValue(f"names {double[:60]!r} twice; keep one of them")
    return row


def _refuse_constant(name: str) -> NoReturn:
    raise _BadValue(f"holds {name}, which is no text; leave the record out or mend it")


_DECODER = json.JSONDecoder(object_pairs_hook=_no_double_keys, parse_constant=_refuse_constant)


def _json_rows(path: Path) -> Iterator[Row]:
    text = read_text(path)
    start = BLANKS.match(text).end()
    if text[start] == "[":
        yield from _list_rows(path, text, start, "")
        return
    value, end = decode_json(path, text, start, "the file" if text[start] == "{" else "its content")
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a list of at least one record, found {type(value).__name__}")
    if text[end:].strip():
        yield from _line_rows(path, text)
    elif _is_single_row(value):
        yield _row(path, 0, "", value)
    else:
        yield from _split_rows(path, value)


def _is_single_row(value: dict[str, Any]) -> bool:
    """Whether a lone object is a record, as in a file of one line, not a set of splits or annotation files."""
    nested = [key for key, held in value.items() if isinstance(held, list | dict)]
    return bool(value) and (not RECORD_FIELDS.isdisjoint(value) or all(key in NESTED_FIELDS for key in nested))


def _list_rows(path: Path, text: str, start: int, split: str) -> Iterator[Row]:
    at, index = BLANKS.match(text, start + 1).end(), 0
    if text[at : at + 1] == "]":
        raise ValueError(f"{path}: expected a list of at least one record, found an empty list")
    while True:
        value, at = decode_json(path, text, at, f"record {index}")
        yield _row(path, index, split, value)
        index += 1
        at = BLANKS.match(text, at).end()
        if text[at : at + 1] == "]":
            break
        if text[at : at + 1] != ",":
            line = text.count("\n", 0, at) + 1
            found = repr(text[at : at + 20]) if at < len(text) else "the end of the file"
            raise ValueError(
                f"{path}: not valid JSON after record {index - 1} (expected , or ], found {found}: line {line}); "
                "is the file cut short? export it again"
            )
        at += 1
    if rest := text[at + 1 :].strip():
        raise ValueError(f"{path}: not valid JSON (after its list of records follows {rest[:20]!r}); export it again")


def _line_rows(path: Path, text: str) -> Iterator[Row]:
    index = 0
    for line, content in enumerate(LINE_ENDS.split(text), 1):
        if not content.strip():
            continue
        value, end = decode_json(path, content, 0, f"record {index} (line {line})")
        if rest := content[end:].strip():
            raise ValueError(f"{path}: record {index} (line {line}) goes on with {rest[:20]!r}; one record a line")
        yield _row(path, index, "", value)
        index += 1


def _split_rows(path: Path, splits: dict[str, Any]) -> Iterator[Row]:
    """R2Gen's form, a list of records for each split."""
    if not splits:
        raise ValueError(f"{path}: expected a list of records, or lists under train, val and test; found no key")
    for name, rows in splits.items():
        try:
            split = split_of(name)
        except ValueError as error:
            raise ValueError(f"{path}: expected a list of records, or lists of them by split: {error}") from error
        if not isinstance(rows, list):
            raise ValueError(f"{path}: {name!r} holds a {type(rows).__name__}; expected a list of records")
        for index, value in enumerate(rows):
            yield _row(f"{path}: {name!r}", index, split, value)


def _row(path: Path | str, index: int, split: str, value: Any) -> Row:
    where = f"{path}: record {index}"
    if not isinstance(value, dict):
        raise ValueError(f"{where} is a {type(value).__name__}; expected an object with named values")
    return Row(where, split, value)


def _table_rows(path: Path, separator: str | None) -> Iterator[Row]:
    """Rows of a CSV with a header, by default with the separator that it shows; empty fields are left out."""
    try:
        with _fields_of_any_size(), path.open(newline="", encoding="utf-8-sig") as file:
            separator = separator or separator_of(file)
            reader = csv.DictReader(file, delimiter=separator, strict=True)
            names = reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
            if len(set(names)) != len(names) or not any(names):
                raise ValueError(f"{path}: its first line must name the columns, each once; found {names}")
            for index, values in enumerate(reader):
                where = f"{path}: record {index} (line {reader.line_num})"
                if None in values or None in values.values():
                    named = SEPARATOR_NAMES[separator]
                    raise ValueError(f"{where} has another number of fields than the header; quote texts with {named}")
                if any(values.values()):  # spreadsheets write rows of separators alone
                    yield Row(where, "", {name: text for name, text in values.items() if text})
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not in UTF-8 (byte {error.start}); save it as UTF-8") from error
    except csv.Error as error:
        raise ValueError(f"{path}: not a readable CSV ({error}); mend or export it again") from error


@contextmanager
def _fields_of_any_size() -> Iterator[None]:
    """Lift csv's limit of 128 KiB a field, which holds for the whole process, while a file of reports is read."""
    limit = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            index = 0
            for batch in file.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    yield Row(f"{path}: record {index}", "", _held(values))
                    index += 1
    except (pa.ArrowException, OSError) as error:
        reason = first_line(error)
        raise ValueError(f"{path}: not a readable Parquet file ({reason}); export it again") from error


def _dataset_rows(name: str) -> Iterator[Row]:
    """Rows of a dataset saved by `datasets`, or of one on the hub. Pictures become files of the cache."""
    for split, dataset in _open_dataset(name).items():
        pictures = [column for column, feature in dataset.features.items() if type(feature).__name__ == "Image"]
        for column in pictures:
            dataset = dataset.cast_column(column, type(dataset.features[column])(decode=False))
        for index, values in enumerate(dataset):
            values |= {column: extract_picture(values[column]) for column in pictures if values[column] is not None}
            yield Row(f"{name}: {split} record {index}", SPLITS.get(split.lower(), ""), _held(values))


def extract_picture(picture: dict[str, Any]) -> str:
    """Path of a picture of a dataset: its own file, or one made in the cache of its bytes, named by their digest."""
    if not picture["bytes"]:
        return picture["path"]
    suffix = Path(picture["path"] or "").suffix or ".png"
    path = pictures_folder() / f"{hashlib.sha256(picture['bytes']).hexdigest()}{suffix}"
    if not path.exists():
        with atomic_path(path) as partial:
            partial.write_bytes(picture["bytes"])
    return str(path)


def pictures_folder() -> Path:
    """Where pictures that a dataset holds within itself are kept as files."""
    from datasets import config

    return Path(config.HF_DATASETS_CACHE) / "slidescribe" / "pictures"


def _open_dataset(name: str) -> dict[str, Any]:
    import datasets

    if Path(name).is_dir():
        try:
            found = datasets.load_from_disk(name)
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ValueError(
                f"{name}: a folder, but no dataset that `save_to_disk` of the library datasets wrote "
                f"({first_line(error)}); name an annotation file"
            ) from error
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", name) and Path(name).suffix not in FILE_SUFFIXES:
        try:
            found = datasets.load_dataset(name)
        except Exception as error:  # the hub fails in many ways, and all mean the same here
            reason = first_line(error)
            raise FileNotFoundError(f"{name}: no such annotation file, nor a dataset on the hub ({reason})") from error
    else:
        raise FileNotFoundError(f"{name}: no such annotation file")
    return dict(found) if isinstance(found, dict) else {"": found}


def _held(values: dict[str, Any]) -> dict[str, Any]:
    """Fields that hold something: columns of a table are None where a record has no such field."""
    return {name: value for name, value in values.items() if value is not None}
