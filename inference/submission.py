"""Prediction files: a list of rows, and the submissions of the REG challenges of 2025 and 2026."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inference.arguments import MEASURES
from slide_features import atomic_path
from slide_reports import Record

DETAILS = ("question", "beam_score", *MEASURES, "cut_off", "generated", "similarity", "n_best", "uncertain", "seconds")


@dataclass(frozen=True)
class Format:
    """A form of the file; ``questions`` says whether an id may come with several."""

    questions: bool

    def check(self, records: Sequence[Record]) -> None:
        """Refuse records that the form cannot hold.

        Raises:
            ValueError: an id comes twice, or with the same question twice.
        """
        seen: dict[tuple[str, str], int] = {}
        for number, record in enumerate(records):
            key = (record.id, record.question if self.questions else "")
            if key in seen:
                again = " with the same question" if self.questions else ""
                raise ValueError(f"{record.id} comes twice{again} in --test_json (records {seen[key]} and {number})")
            seen[key] = number


class _Any(Format):
    def check(self, records: Sequence[Record]) -> None:
        pass


FORMATS = {"list": _Any(True), "reg2025": Format(False), "reg2026": Format(True)}


def write_predictions(
    output: Path, records: Sequence[Record], answers: dict[int, dict[str, Any]], *, form: str, details: bool
) -> None:
    """Write the answers in the order of the records: ``[{"id", "report"}]``, or a chain of questions for each id."""
    found = [(record, answers[number]) for number, record in enumerate(records) if number in answers]
    rows = _chains(found) if form == "reg2026" else [_row(answer, details) for _, answer in found]
    with atomic_path(output) as partial:
        partial.write_text(json.dumps(rows, indent=1) + "\n")


def _row(answer: dict[str, Any], details: bool) -> dict[str, Any]:
    keys = ("id", "report", *(DETAILS if details else ()))
    return {key: answer[key] for key in keys if key in answer}


def _chains(found: list[tuple[Record, dict[str, Any]]]) -> list[dict[str, Any]]:
    """``{"id", "chain-of-thought": [{"question", "answer", "next_question"}]}``; the last has no next question."""
    chains: dict[str, list[dict[str, Any]]] = {}
    for record, answer in found:
        step = {"question": answer["question"], "answer": answer["report"], "next_question": ""}
        steps = chains.setdefault(record.id, [])
        if steps:
            steps[-1]["next_question"] = step["question"]
        steps.append(step)
    return [{"id": record_id, "chain-of-thought": steps} for record_id, steps in chains.items()]
