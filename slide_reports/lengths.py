"""How many tokens each record will be to the language model, before any of them is read."""

import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from slide_reports.inputs import MAX_OPENED, num_tiles_of_file
from slide_reports.prompt import Prompt
from slide_reports.record import Record
from slide_reports.table import fields

RECORDS_AT_ONCE = 4096  # whose texts stand in memory together
WORTH_A_WARNING = 0.01  # of the texts cut
KINDS = ("questions", "answers")  # as a turn has them
LOSS = {"questions": "", "answers": ", and the model does not learn to end them"}


def record_lengths(
    records: Sequence[Record],
    tokenizer: Any,
    prompt: Prompt,
    question: str,
    *,
    max_question_tokens: int,
    max_answer_tokens: int,
    num_visual_tokens: int,
    tiles_bound_tokens: bool,
) -> np.ndarray:
    """Tokens of each record, (N,) int32: exact for its text, at most for its slides or images.

    Args:
        records: a table or list of them.
        tokenizer: of the language model.
        prompt: the text around image, question and answer.
        question: asked where a record has none.
        max_question_tokens: longer questions lose their end.
        max_answer_tokens: longer answers lose their end.
        num_visual_tokens: of a case at most.
        tiles_bound_tokens: a case with fewer tiles has only as many visual tokens; its feature files are looked into,
            unless there are more than `MAX_OPENED`.
    """
    num_tiles = _num_tiles(records) if tiles_bound_tokens else {}
    end_of_answer = len(tokenizer(prompt.after_answer, add_special_tokens=False)["input_ids"])
    lengths = np.zeros(len(records), dtype=np.int32)
    bar = tqdm(total=len(records), desc="counting tokens", unit="record", delay=5, leave=False)
    position = 0
    for some in _chunks(fields(records, "inputs", "turns")):
        answers = list(dict.fromkeys(answer for _, turns in some for _, answer in turns if answer))
        ids = tokenizer(answers, add_special_tokens=False)["input_ids"] if answers else []
        tokens_of = {
            answer: max_answer_tokens if len(found) > max_answer_tokens else len(found) + end_of_answer
            for answer, found in zip(answers, ids, strict=True)
        }
        asked: dict[tuple[str, int], int] = {}
        for inputs, turns in some:
            length = min(num_visual_tokens, sum(num_tiles.get(path, num_visual_tokens) for path in inputs))
            for number, (text, answer) in enumerate(turns):
                key = (text, 0) if number else (text or question, len(inputs))
                if key not in asked:
                    asked[key] = len(_asked_ids(tokenizer, prompt, *key, max_question_tokens))
                length += asked[key] + tokens_of.get(answer, 0)
            lengths[position] = length - len(inputs)  # markers, in whose place the visual tokens are
            position += 1
        bar.update(len(some))
    bar.close()
    return lengths


@dataclass(frozen=True)
class CutTexts:
    """How many questions or answers a limit cuts.

    Attributes:
        cut: longer than the limit, so that they lose their end.
        total: all that are not empty.
        longest: tokens of the longest of those cut; 0 where there is none.
    """

    cut: int
    total: int
    longest: int

    @property
    def is_much(self) -> bool:
        """Whether it is worth a warning."""
        return self.cut > WORTH_A_WARNING * self.total

    def __str__(self) -> str:
        """As ``run.json`` says it."""
        return f"{self.cut:,} of {self.total:,}"


def cut_texts(records: Sequence[Record], kind: str, tokenizer: Any, limit: int) -> CutTexts:
    """Count the ``questions`` or ``answers`` of all turns that have more tokens than ``limit``.

    A token has at least one byte, but for one that some tokenizers begin with; so only texts of as many bytes are
    tokenized.
    """
    cut, total, longest = 0, 0, 0
    for some in _chunks(fields(records, "turns")):
        texts = Counter(turn[KINDS.index(kind)] for (turns,) in some for turn in turns)
        texts.pop("", None)
        total += texts.total()
        long = [text for text in texts if len(text.encode()) >= limit]
        found = tokenizer(long, add_special_tokens=False)["input_ids"] if long else []
        for text, ids in zip(long, found, strict=True):
            if len(ids) > limit:
                cut += texts[text]
                longest = max(longest, len(ids))
    return CutTexts(cut, total, longest)


def tell_cut_texts(tokenizer: Any, limits: dict[str, int], **splits: Sequence[Record]) -> dict[str, dict[str, str]]:
    """How many texts of each split lose their end, for ``run.json``: ``{"cut_answers": {"train": "3 of 20"}}``.

    Warns where they are more than one in a hundred. The first process alone looks.

    Args:
        tokenizer: of the language model.
        limits: tokens that ``questions`` and ``answers`` may have.
        **splits: records by the name of their split.
    """
    if os.environ.get("RANK", "0") != "0":
        return {}
    told: dict[str, dict[str, str]] = {}
    for kind, limit in limits.items():
        for name, records in splits.items():
            found = cut_texts(records, kind, tokenizer, limit)
            if found.total:
                told.setdefault(f"cut_{kind}", {})[name] = str(found)
            if found.is_much:
                print(
                    f"warning: {name}: {found} {kind} ({found.cut / found.total:.1%}) have more than {limit} tokens, "
                    f"the longest {found.longest:,}; they lose their end{LOSS[kind]}: raise --max_{kind[:-1]}_tokens",
                    file=sys.stderr,
                )
    return told


def _asked_ids(tokenizer: Any, prompt: Prompt, question: str, num_images: int, max_question_tokens: int) -> list[int]:
    if num_images:
        return prompt.question_ids(tokenizer, question, max_question_tokens, num_images)
    return prompt.next_question_ids(tokenizer, question, max_question_tokens)


def _chunks(values: Iterator[tuple[Any, ...]]) -> Iterator[list[tuple[Any, ...]]]:
    while some := list(islice(values, RECORDS_AT_ONCE)):
        yield some


def _num_tiles(records: Sequence[Record]) -> dict[str, int]:
    """Tiles of each feature file, from what was read of it when it was checked; none of very many files."""
    paths = list(dict.fromkeys(path for (paths,) in fields(records, "inputs") for path in paths))
    if len(paths) > MAX_OPENED:
        return {}

    def count(path: str) -> int | None:
        try:
            return num_tiles_of_file(Path(path))
        except (ValueError, OSError):
            return None  # it is left out, and said, when it is read

    with ThreadPoolExecutor(8) as pool:
        return {path: tiles for path, tiles in zip(paths, pool.map(count, paths), strict=True) if tiles is not None}
