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
WORTH_A_WARNING = 0.01  # of the answers cut


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
class CutAnswers:
    """How many answers a limit cuts.

    Attributes:
        cut: longer than the limit, so that they lose their end.
        total: answers that are not empty.
        longest: tokens of the longest of those cut; 0 where there is none.
    """

    cut: int
    total: int
    longest: int

    @property
    def is_much(self) -> bool:
        """Whether it is worth a warning."""
        return self.cut > WORTH_A_WARNING * self.total


def cut_answers(records: Sequence[Record], tokenizer: Any, max_answer_tokens: int) -> CutAnswers:
    """Count the answers of all turns that are longer than the limit.

    A token has at least one byte, so that only answers of more bytes than the limit has tokens are tokenized.
    """
    cut, total, longest = 0, 0, 0
    for some in _chunks(fields(records, "turns")):
        answers = Counter(answer for (turns,) in some for _, answer in turns if answer)
        total += answers.total()
        long = [answer for answer in answers if len(answer.encode()) >= max_answer_tokens]
        found = tokenizer(long, add_special_tokens=False)["input_ids"] if long else []
        for answer, ids in zip(long, found, strict=True):
            if len(ids) > max_answer_tokens:
                cut += answers[answer]
                longest = max(longest, len(ids))
    return CutAnswers(cut, total, longest)


def tell_cut_answers(tokenizer: Any, max_answer_tokens: int, **splits: Sequence[Record]) -> dict[str, str]:
    """``cut of all`` answers of each split that has some, for ``run.json``.

    Warns where they are more than one in a hundred. The first process alone looks.
    """
    if os.environ.get("RANK", "0") != "0":
        return {}
    found = {name: cut_answers(records, tokenizer, max_answer_tokens) for name, records in splits.items()}
    for name, answers in found.items():
        if answers.is_much:
            print(
                f"warning: {name}: {answers.cut:,} of {answers.total:,} answers ({answers.cut / answers.total:.1%}) "
                f"have more than {max_answer_tokens} tokens, the longest {answers.longest:,}; they lose their end, "
                "and the model does not learn to end them: raise --max_answer_tokens",
                file=sys.stderr,
            )
    return {name: f"{answers.cut:,} of {answers.total:,}" for name, answers in found.items() if answers.total}


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
