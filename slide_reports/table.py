"""Many records, kept in Arrow by the library `datasets`: a million of them take no memory to speak of."""

import gc
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
from datasets import Dataset

from slide_reports.record import Record

TURN = pa.struct([("question", pa.string()), ("answer", pa.string())])
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("inputs", pa.list_(pa.string())),
        ("turns", pa.list_(TURN)),
        ("group", pa.string()),
        ("split", pa.string()),
    ]
)
ROWS_PER_CHUNK = 8192


class RecordTable(Sequence[Record]):
    """A sequence of records that lie on disk, memory-mapped; selections of it share the file.

    The file is made anew by every process in its temporary folder, and goes with the last table on it.
    """

    def __init__(self, dataset: Dataset, rows: np.ndarray):
        """Table of some rows of a dataset with the columns of `SCHEMA`."""
        self._dataset = dataset
        self._rows = rows

    @classmethod
    def of(cls, records: Iterable[Record]) -> "RecordTable":
        """Write records to a temporary Arrow file and map it."""
        folder = tempfile.TemporaryDirectory(prefix="slidescribe_records_")
        path = Path(folder.name) / "records.arrow"
        records = iter(records)
        with _no_garbage_collection(), pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:
            while chunk := list(islice(records, ROWS_PER_CHUNK)):
                writer.write_batch(_batch(chunk))
        dataset = Dataset.from_file(str(path))
        weakref.finalize(dataset, folder.cleanup)
        return cls(dataset, np.arange(len(dataset)))

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> "RecordTable": ...

    def __getitem__(self, index):
        """One record, or a part of the table."""
        if isinstance(index, slice):
            return RecordTable(self._dataset, self._rows[index])
        return _record(self._dataset.data.fast_slice(int(self._rows[index]), 1).to_pylist()[0])

    def __iter__(self) -> Iterator[Record]:
        for chunk in self._chunks(SCHEMA.names):
            yield from (_record(values) for values in chunk.to_pylist())

    def select(self, positions: Sequence[int] | np.ndarray) -> "RecordTable":
        """The records at some positions, in that order; one may come more than once."""
        return RecordTable(self._dataset, self._rows[np.asarray(positions, dtype=np.int64)])

    def distinct(self) -> "RecordTable":
        """Every record of the table once, in the order of the file: one that a meta file repeats is the same record."""
        return RecordTable(self._dataset, np.unique(self._rows))

    def fields(self, *names: str) -> Iterator[tuple[Any, ...]]:
        """Some fields of every record, as `fields` gives them, without making the records."""
        for chunk in self._chunks(list(names)):
            yield from zip(*(_values(chunk.column(name), name) for name in names), strict=True)

    def _chunks(self, names: list[str]) -> Iterator[pa.Table]:
        table = self._dataset.data.table.select(names)
        for start in range(0, len(self._rows), ROWS_PER_CHUNK):
            yield table.take(pa.array(self._rows[start : start + ROWS_PER_CHUNK]))


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Leave cycles alone while objects without any are made by the million: looking for them takes a quarter longer."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def fields(records: Sequence[Record], *names: str) -> Iterator[tuple[Any, ...]]:
    """Some fields of every record, of a table or a list; `inputs` as lists of texts, `turns` as tuples of pairs.

    They come one record after the other, so that those of a million records do not stand in memory together.
    """
    if isinstance(records, RecordTable):
        yield from records.fields(*names)
        return
    for record in records:
        yield tuple([*map(str, record.inputs)] if name == "inputs" else getattr(record, name) for name in names)


def column(records: Sequence[Record], name: str) -> list[Any]:
    """One field of all records, as `fields` gives it; equal texts are one object."""
    known: dict[Any, Any] = {}
    if name in ("id", "group", "split"):
        return [known.setdefault(value, value) for (value,) in fields(records, name)]
    return [value for (value,) in fields(records, name)]


def select(records: Sequence[Record], positions: Sequence[int] | np.ndarray) -> Sequence[Record]:
    """Some of the records, of a table or a list."""
    if isinstance(records, RecordTable):
        return records.select(positions)
    return [records[position] for position in positions]


def distinct(records: Sequence[Record]) -> Sequence[Record]:
    """The records without the repetitions of a table; a list has none."""
    return records.distinct() if isinstance(records, RecordTable) else records


def _batch(records: list[Record]) -> pa.RecordBatch:
    """Records as one Arrow batch, built column by column, which is five times as fast as row by row."""
    inputs = _lists([[str(path) for path in record.inputs] for record in records], pa.string())
    turns = [record.turns for record in records]
    questions, answers = (pa.array([turn[i] for turns_ in turns for turn in turns_], pa.string()) for i in (0, 1))
    texts = pa.StructArray.from_arrays([questions, answers], fields=list(TURN))
    arrays = [
        pa.array([record.id for record in records], pa.string()),
        inputs,
        pa.ListArray.from_arrays(_offsets(turns), texts, type=SCHEMA.field("turns").type),
        pa.array([record.group for record in records], pa.string()),
        pa.array([record.split for record in records], pa.string()),
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)


def _lists(values: list[list[Any]], of: pa.DataType) -> pa.ListArray:
    flat = pa.array([value for held in values for value in held], of)
    return pa.ListArray.from_arrays(_offsets(values), flat, type=pa.list_(of))


def _offsets(values: Sequence[Sequence[Any]]) -> pa.Array:
    return pa.array(np.cumsum([0, *map(len, values)]), pa.int32())


def _record(values: dict[str, Any]) -> Record:
    (question, answer), *later = _turns(values["turns"])
    inputs = tuple(Path(path) for path in values["inputs"])
    return Record(values["id"], inputs, question, answer, values["group"], values["split"], tuple(later))


def _values(values: pa.ChunkedArray, name: str) -> list[Any]:
    if name != "turns":
        return values.to_pylist()
    return [turns for part in values.chunks for turns in _turns_of(part)]


def _turns_of(stored: pa.ListArray) -> Iterator[tuple[tuple[str, str], ...]]:
    """Turns of records by whole columns of texts, without a dictionary for each turn."""
    questions, answers = (stored.flatten().field(name).to_pylist() for name in ("question", "answer"))
    pairs = list(zip(questions, answers, strict=True))
    offsets = stored.offsets.to_numpy() - stored.offsets[0].as_py()
    return (tuple(pairs[start:end]) for start, end in pairwise(offsets.tolist()))


def _turns(stored: list[dict[str, str]]) -> tuple[tuple[str, str], ...]:
    return tuple((turn["question"], turn["answer"]) for turn in stored)
