"""What a row of an annotation file means: each known form, told apart by its fields, becomes drafts of records.

| form | fields |
|---|---|
| REG 2025, and any list of reports | ``id``, ``report``; optionally ``question``, ``slides`` (names of several) |
| REG 2026, chain of questions | ``id``, ``chain-of-thought``: a list of ``question``, ``answer``, ``next_question`` |
| R2Gen | ``id``, ``report``, ``image_path``: a list of images |
| image captions | ``image``, ``caption`` |
| image questions | ``image``, ``problem``, ``normal_caption``; or ``image``, ``question``, ``answer`` |
| LLaVA, InternVL | ``conversations`` of ``from``, ``value``; ``image``: one or a list, pictures or feature files |
| chat messages | ``messages`` of ``role``, ``content``; ``images`` |
| WSI-VQA | ``Id``, ``Question``, ``Answer``, and ``Choice`` where it is a choice |
| table of feature files | ``h5_path``, ``slide_id``, with ``caption``, or with ``question`` and ``answer`` |
| table of slides | ``slide_id`` with ``report`` or ``caption``, or with ``question`` and ``answer`` |

Fields that any of them may have: ``split``, ``patient_id``, ``subject_id`` (MIMIC-CXR), ``case_id``.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from typing import Any

from slide_reports.annotation_files import Row, split_of
from slide_reports.record import slide_id_of

SURROGATES = re.compile("[\ud800-\udfff]")
WHOLE_AS_FRACTION = re.compile(r"^(\d+)\.0$")  # what pandas makes of whole numbers where some are missing
IMAGE_MARKER = re.compile(r"\s*<image>\s*")
CHAIN_KEYS = ("chain-of-thought", "chain_of_thought")
FEATURE_NAMES = (".h5", ".hdf5", ".pt", ".zarr", ".zarr.zip")
HUMAN, ASSISTANT = {"human", "user"}, {"gpt", "assistant", "model"}
CHOICE_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
GROUP_FIELDS = ("patient_id", "subject_id", "case_id")


@dataclass(frozen=True)
class Draft:
    """A record whose inputs are still names.

    Attributes:
        id: as the annotation file names it.
        names: of its inputs, as in the file.
        kind: what they name: `slide` (a slide_id whose feature file is meant), `features` (a feature file) or `image`.
        case: the name in which the patient is looked for.
        turns: (question, answer) pairs.
        group: the patient where the file says so, else empty.
        split: `train`, `val`, `test` or empty.
    """

    id: str
    names: tuple[str, ...]
    kind: str
    case: str
    turns: tuple[tuple[str, str], ...]
    group: str
    split: str


def read_drafts(row: Row) -> list[Draft]:
    """The records of a row.

    Raises:
        ValueError: the form is unknown, or a field is missing or no text; names the file, the record and the field.
    """
    form = _form_of(tuple(row.values))
    if form is not None:
        return form(row)
    found = _shown(", ".join(sorted(map(str, row.values))), 200) or "none"
    raise ValueError(
        f"{row.where} is of an unknown form, with the fields {found}; expected id and report, image and caption, "
        "image, problem and normal_caption, conversations, or another form that the documentation lists"
    )


@lru_cache(maxsize=256)
def _form_of(names: tuple[str, ...]) -> Callable[[Row], list[Draft]] | None:
    """What reads a row with fields of these names; the rows of a file are much alike."""
    for fields, form in FORMS:
        if all(any(name in names for name in alternatives) for alternatives in fields):
            return form
    return None


def _report(row: Row) -> list[Draft]:
    record_id = _text(row, "id" if "id" in row.values else "slide_id")
    names = _names(row, "slides") if "slides" in row.values else (record_id,)
    answer = next((name for name in ("report", "caption") if name in row.values), "report")
    return [_draft(row, record_id, names, "slide", [(_text(row, "question", ""), _text(row, answer, ""))])]


def _chain(row: Row) -> list[Draft]:
    key = next(key for key in CHAIN_KEYS if key in row.values)
    record_id, steps = _text(row, "id"), row.values[key]
    drafts = []
    for number, step in enumerate(_list(row, key, steps)):
        inner = _inner(row, f"{key!r} step {number}", step)
        turn = (_text(inner, "question"), _text(inner, "answer", ""))
        drafts.append(_draft(row, record_id, (record_id,), "slide", [turn]))
    return drafts


def _images_report(row: Row) -> list[Draft]:
    draft = _image_draft(row, "image_path", "", _text(row, "report", ""))
    return [replace(draft, case=slide_id_of(draft.id))]  # its images may be called 0.png and 1.png in every case


def _caption(row: Row) -> list[Draft]:
    return [_image_draft(row, "image", _text(row, "question", ""), _text(row, "caption", ""))]


def _image_question(row: Row) -> list[Draft]:
    question, answer = ("problem", "normal_caption") if "problem" in row.values else ("question", "answer")
    return [_image_draft(row, "image", _text(row, question), _text(row, answer, ""))]


def _conversation(row: Row) -> list[Draft]:
    """LLaVA's and InternVL's conversations, or chat messages; each answer is taught, whichever turn it is."""
    key, speaker, said = ("conversations", "from", "value")
    if key not in row.values:
        key, speaker, said = "messages", "role", "content"
    asked, turns = "", []
    for number, message in enumerate(_list(row, key, row.values[key])):
        inner = _inner(row, f"{key!r} message {number}", message)
        who, text = _text(inner, speaker).strip().lower(), _text(inner, said, "")
        if who == "system":
            asked = f"{asked}{text}\n"
        elif who in HUMAN:
            asked += IMAGE_MARKER.sub("\n" if turns else "", text).strip()
        elif who in ASSISTANT:
            turns.append((asked, text.strip()))
            asked = ""
        else:
            raise ValueError(f"{inner.where} is by {who[:40]!r}; expected human and gpt, or user and assistant")
    if asked:
        turns.append((asked, ""))
    if not turns:
        raise ValueError(f"{row.where} has no question and no answer under {key!r}")
    images = next((name for name in ("image", "images") if name in row.values), "image")
    names = _names(row, images)
    record_id = _own_id(row, names[0])
    return [_draft(row, record_id, names, _kind(row, names), turns, case=names[0])]


def _choice(row: Row) -> list[Draft]:
    """WSI-VQA: a question, with choices or open."""
    record_id, question, answer = _text(row, "Id"), _text(row, "Question"), _text(row, "Answer", "")
    choices = row.values.get("Choice")
    if choices:
        listed = _names(row, "Choice")
        question += "".join(f"\n{choice_label(i)}. {text}" for i, text in enumerate(listed))
    return [_draft(row, record_id, (record_id,), "slide", [(question, answer)])]


def choice_label(number: int) -> str:
    """A, B, … Z, AA, AB, …: the label of a choice, counted from 0."""
    label = ""
    while number >= 0:
        number, letter = divmod(number, len(CHOICE_LETTERS))
        label, number = CHOICE_LETTERS[letter] + label, number - 1
    return label


def _features_table(row: Row) -> list[Draft]:
    name = _text(row, "h5_path")
    record_id = _text(row, "slide_id", name)
    question = _text(row, "question", "")
    answer = _text(row, "answer", "") if question.strip() else _text(row, "caption", "")
    return [_draft(row, record_id, (name,), "features", [(question, answer)])]


def _slide_question(row: Row) -> list[Draft]:
    record_id = _text(row, "slide_id" if "slide_id" in row.values else "id")
    turn = (_text(row, "question"), _text(row, "answer", ""))
    return [_draft(row, record_id, (record_id,), "slide", [turn])]


# What must be there, each a choice of fields, and what reads it. The first form that fits is taken.
FORMS: tuple[tuple[tuple[tuple[str, ...], ...], Callable[[Row], list[Draft]]], ...] = (
    ((("conversations", "messages"),), _conversation),
    ((("id",), CHAIN_KEYS), _chain),
    ((("Id",), ("Question",)), _choice),
    ((("h5_path",),), _features_table),
    ((("image",), ("problem",)), _image_question),
    ((("image",), ("caption",)), _caption),
    ((("image",), ("question",)), _image_question),
    ((("image_path",), ("report",)), _images_report),
    ((("id", "slide_id"), ("question",), ("answer",)), _slide_question),
    ((("id", "slide_id"),), _report),
)


def _image_draft(row: Row, key: str, question: str, answer: str) -> Draft:
    names = _names(row, key)
    record_id = _own_id(row, names[0])
    return _draft(row, record_id, names, _kind(row, names), [(question, answer)], case=names[0])


def _own_id(row: Row, other: str) -> str:
    """The id of a record that need not have one."""
    value = row.values.get("id")
    if value is None or value == "":
        return other
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{row.where} has {_shown(repr(value), 60)} under 'id'; expected a name or a number")
    return str(value)


def _draft(
    row: Row, record_id: str, names: tuple[str, ...], kind: str, turns: list[tuple[str, str]], case: str = ""
) -> Draft:
    if not record_id.strip():
        raise ValueError(f"{row.where} has an empty id; name the case")
    group = _group(row)
    split = row.split
    if stated := _text(row, "split", ""):
        try:
            split = split_of(stated)
        except ValueError as error:
            raise ValueError(f"{row.where} ({_shown(record_id)}): {error}") from error
    cleaned = tuple([(question, answer.strip()) for question, answer in turns])
    text = "".join([record_id, group, *names, *chain.from_iterable(cleaned)])
    if not text.isascii() and SURROGATES.search(text):
        raise ValueError(f"{row.where} ({_shown(record_id)}) holds half a character (\\ud800 to \\udfff); mend it")
    return Draft(record_id, names, kind, slide_id_of(case or record_id), cleaned, group, split)


def _group(row: Row) -> str:
    """The patient that a row names, empty where it names none. Tables write 7 as `7.0` and `7 ` now and then."""
    for key in GROUP_FIELDS:
        value = row.values.get(key)
        if value is None or value != value:  # NaN is how tables say that there is none
            continue
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError(f"{row.where} has {_shown(repr(value))} under {key!r}; expected a name or a number")
        if group := WHOLE_AS_FRACTION.sub(r"\1", str(value).strip()):
            return group
    return ""


def _shown(text: str, length: int = 60) -> str:
    """The beginning of a text from a file as it fits into a line of a message."""
    return "".join(character if character.isprintable() else " " for character in text[:length])


def _kind(row: Row, names: tuple[str, ...]) -> str:
    kinds = {"features" if name.lower().endswith(FEATURE_NAMES) else "image" for name in names}
    if len(kinds) > 1:
        raise ValueError(f"{row.where} names both images and feature files; a case is of one kind")
    return kinds.pop()


def _text(row: Row, key: str, default: str | None = None) -> str:
    """The text under a key; without a default it must be there and not blank."""
    value = row.values.get(key, default)
    if not isinstance(value, str) or (default is None and not value.strip()):
        found = "nothing" if key not in row.values else repr(value)[:60]
        name = row.values.get("id", row.values.get("image"))
        named = f" ({_shown(name)})" if isinstance(name, str) else ""
        raise ValueError(f"{row.where}{named} has {found} under {key!r}; expected text")
    return value


def _names(row: Row, key: str) -> tuple[str, ...]:
    """The texts under a key, one or a list of them."""
    value = row.values.get(key)
    names = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else ()
    if not names or not all(isinstance(name, str) and name.strip() for name in names):
        found = "nothing" if key not in row.values else repr(value)[:60]
        raise ValueError(f"{row.where} has {found} under {key!r}; expected a name, or a list of names")
    return names


def _list(row: Row, key: str, value: Any) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{row.where} has {repr(value)[:60]} under {key!r}; expected a list that holds something")
    return value


def _inner(row: Row, what: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"{row.where}, {what}, is a {type(value).__name__}; expected an object with named values")
    return Row(f"{row.where}, {what},", row.split, value)
