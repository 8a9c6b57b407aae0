"""Records grouped by case, and read ahead: while one batch is decoded, a thread reads or encodes the next."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inference.answers import make_sample, one_line, read_inputs
from inference.memory import READING, is_out_of_memory, memory_line
from slide_reports import Record, read_records

if TYPE_CHECKING:
    from inference.new_slides import SlideReader
    from stage0_tiling.slide_list import SlideEntry


@dataclass
class CaseBatch:
    """Records of one or several cases that are answered together.

    Attributes:
        records: by number.
        samples: what the model takes, by number, of those whose inputs could be read.
        failed: an error for each of the others, by number.
    """

    records: dict[int, Record]
    samples: dict[int, dict[str, Any]] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.records)

    @property
    def num_cases(self) -> int:
        """Different cases that were read."""
        return len({self.records[number].inputs for number in self.samples})


def records_to_answer(test_json: str, features_dir: str | None, image_root: str | None) -> list[Record]:
    """The records of a file, or those of its test split where it has one."""
    records = read_records(test_json, features_dir=features_dir, image_root=image_root)
    return _test_split(records)


def records_of_slides(sources: list[str], test_json: str | None) -> tuple[list[Record], "dict[Path, SlideEntry]"]:
    """A record for each slide, or the records of a file that name them; and the slides by path.

    Raises:
        ValueError: a record names a slide that is not there.
    """
    from stage0_tiling.slide_list import find_slides

    entries = {entry.slide_id: entry for entry in find_slides(sources)}
    slides = {entry.path: entry for entry in entries.values()}
    if test_json is None:
        return [Record(e.path.name, (e.path,), "", "", e.slide_id) for e in entries.values()], slides
    paths = {slide_id: entry.path for slide_id, entry in entries.items()}
    return _test_split(read_records(test_json, slides=paths)), slides


def _test_split(records: Sequence[Record]) -> list[Record]:
    records = list(records)
    return [record for record in records if record.split == "test"] or records


def batches_of(records: Sequence[Record], finished: dict[int, Any], batch_size: int) -> list[CaseBatch]:
    """Unanswered records in batches of about ``batch_size``, in order; those of one case stay together."""
    cases: dict[tuple[Path, ...], dict[int, Record]] = {}
    for number, record in enumerate(records):
        if number not in finished:
            cases.setdefault(record.inputs, {})[number] = record
    batches: list[CaseBatch] = []
    for of_case in cases.values():
        if batches and len(batches[-1]) + len(of_case) <= batch_size:
            batches[-1].records |= of_case
        else:
            batches.append(CaseBatch(dict(of_case)))
    return batches


def read_ahead(
    batches: list[CaseBatch], model, tokenizer, reader: "SlideReader | None", slides: "dict[Path, SlideEntry]"
) -> Iterator[CaseBatch]:
    """The batches, read, in order: the next one is read by a thread while the caller works on this one."""
    with ThreadPoolExecutor(1) as pool:
        coming = [pool.submit(read_batch_of_cases, batch, model, tokenizer, reader, slides) for batch in batches[:1]]
        for number in range(len(batches)):
            ready = coming.pop().result()
            for batch in batches[number + 1 : number + 2]:
                coming.append(pool.submit(read_batch_of_cases, batch, model, tokenizer, reader, slides))
            yield ready
            batches[number] = CaseBatch({})  # what was read of it is not needed any more


def read_batch_of_cases(
    batch: CaseBatch, model, tokenizer, reader: "SlideReader | None", slides: "dict[Path, SlideEntry]"
) -> CaseBatch:
    """Read the inputs of a batch, each case once; a case that cannot be read fails alone."""
    cases: dict[tuple[Path, ...], dict[str, Any] | str] = {}
    for number, record in batch.records.items():
        if record.inputs not in cases:
            cases[record.inputs] = _read_case(record, model, reader, slides)
        case = cases[record.inputs]
        if isinstance(case, str):
            batch.failed[number] = case
            continue
        question = record.question or model.settings.question
        batch.samples[number] = make_sample(model, tokenizer, question, case, len(record.inputs))
    return batch


def _read_case(
    record: Record, model, reader: "SlideReader | None", slides: "dict[Path, SlideEntry]"
) -> dict[str, Any] | str:
    """What is read of a record's case, or what is wrong with it."""
    try:
        if reader is None:
            return read_inputs(model, record.inputs)
        entries = [slides[path] for path in record.inputs]
        assumed = [{} if entry.assume_mpp is None else {"assume_mpp": entry.assume_mpp} for entry in entries]
        stated = [more | {"slide_mpp": entry.mpp} for more, entry in zip(assumed, entries, strict=True)]
        return reader.read(record.inputs, stated)
    except (ValueError, OSError) as error:
        return str(error)
    except (RuntimeError, MemoryError) as error:  # no memory for an encoder's tiles, a codec that gives up
        return memory_line(error, READING) if is_out_of_memory(error) else one_line(error)
