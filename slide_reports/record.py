"""A record: one case with a question and its answer, or several in turn; and the names in it."""

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

EXTENSION = re.compile(r"[A-Za-z][A-Za-z0-9]{1,6}")
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
        later_turns: (question, answer) pairs that follow in a conversation about the case.
    """

    id: str
    inputs: tuple[Path, ...]
    question: str
    answer: str
    group: str
    split: str = ""
    later_turns: tuple[tuple[str, str], ...] = ()

    @property
    def turns(self) -> tuple[tuple[str, str], ...]:
        """All (question, answer) pairs, in order."""
        return ((self.question, self.answer), *self.later_turns)


@lru_cache(maxsize=2**16)
def slide_id_of(name: str) -> str:
    """The file name of a slide without its last extension, where it has one that is not part of the identifier."""
    stem, dot, extension = name.rpartition(".")
    return stem if dot and stem and EXTENSION.fullmatch(extension) else name


@lru_cache(maxsize=2**16)
def patient_of(slide_id: str, pattern: str | None = None) -> str:
    """The patient of a slide.

    Args:
        slide_id: of a REG (``PIT_<centre>_<patient>_<slide>``) or TCGA slide, folders may precede it or be called so;
            any other slide is its own patient.
        pattern: regular expression searched in ``slide_id`` instead; its first group, or the whole match, is the
            patient, and a slide without a match is its own patient.
    """
    if pattern is not None:
        match = re.search(pattern, slide_id)
        found = match and (match.group(1) if match.re.groups else match.group())
        return found or slide_id
    for name in reversed(slide_id.split("/")):
        if match := REG_PATIENT.match(name) or TCGA_PATIENT.match(name):
            return match.group(1)
    return slide_id
