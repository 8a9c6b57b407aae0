"""A dialogue about one case in the terminal: what was said stays in the cache, and each question is read behind it."""

import sys
from collections.abc import Iterator
from typing import Any

import torch

from command_line import DONE
from inference.answers import Answering, make_sample, unread_line
from inference.decoding import decode, text_of
from inference.loading import room_for_text
from inference.prefixes import extend_prefix, last_markers, read_prefixes
from projectors import PROMPT_TOPK
from slide_reports import Prompt
from slide_vlm import SlideVLM

LEAVE = ("", "exit", "quit")


def chat(
    model: SlideVLM, tokenizer, case: dict[str, Any], num_inputs: int, answering: Answering, first: list[str]
) -> int:
    """Answer questions from ``first``, then from stdin, a line each, until an empty line or its end.

    Answers go to stdout, and what is to be said of them and of questions to stderr. A question is prompted for there
    where somebody sits at the keyboard.

    Raises:
        PromptTooLong: the language model has no position left for an answer about the case.
    """
    prompt, longest = Prompt(**model.settings.prompt), model.settings.max_question_tokens
    stop_ids = prompt.stop_ids(tokenizer, model.base_llm)
    slide, prefix, length, room = None, None, 0, room_for_text(model)
    for number, question in enumerate(_questions(first)):
        for line in unread_line(model.settings, tokenizer, question):
            print(line, file=sys.stderr)
        if prefix is not None:
            asked = prompt.next_question_ids(tokenizer, question, longest)
            if length + len(asked) + answering.decoding.max_new_tokens > room:
                print("what was said before is forgotten: the model reads no more at once", file=sys.stderr)
                prefix = None
        if prefix is None:
            sample = make_sample(model, tokenizer, question, case, num_inputs)
            # A reducer may choose visual tokens by the question, so only others keep the slide as it was read.
            if slide is None or model.settings.token_reducer == PROMPT_TOPK:
                (slide,) = read_prefixes(model, [sample])
            prefix = slide
            (cut,) = last_markers(torch.tensor([sample["input_ids"]]))
            asked = sample["input_ids"][cut:]
        (answers,) = decode(
            model,
            [prefix],
            [asked],
            stop_ids=stop_ids,
            decoding=answering.decoding,
            constraint=answering.constraint,
            numbers=[number],
        )
        print(text_of(tokenizer, answers[0]), flush=True)
        for line in answering.remarks(answering.describe(tokenizer, answers)):
            print(line, file=sys.stderr)
        ending = tokenizer(prompt.after_answer, add_special_tokens=False)["input_ids"]
        said = [*asked, *answers[0].token_ids, *ending]
        length = len(prefix) + len(said)
        if length < room:  # else the next question will find no room, and begin anew
            prefix = extend_prefix(model, prefix, said)
    return DONE


def _questions(first: list[str]) -> Iterator[str]:
    yield from first
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if line.strip().lower() in LEAVE:
            return
        yield line.strip()
