"""Decoding behind a visual prefix that is read once, by Hugging Face's ``generate``.

``generate(inputs_embeds=…)`` cannot pass Gemma-3n's per-layer inputs, and stock beam search reads the prompt once per
beam. Here a prompt is read in two pieces through :meth:`SlideVLM.embed`: the prefix up to its last visual token, once
for all questions about a slide, and the rest of each question behind a copy of its cache. Then beams share what was
read, and ``generate`` goes on from there. Rows are padded on the left.

Shapes: B rows, L columns of the prompts, W columns behind the shared ones.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import groupby

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.cache_utils import Cache

from inference.choice import BeamRecorder, Constraint, Recorder, choice_processors
from inference.prefix_cache import Prefix, SharedPrefixCache, Sharing, shared_attention
from inference.prefixes import end_of_markers, read_columns, read_prefixes
from inference.room import answer_limits
from slide_reports import Prompt
from slide_vlm import SlideVLM


@dataclass(frozen=True)
class Decoding:
    """How answers are searched or drawn.

    Attributes:
        num_beams: beams a sample; 1 is greedy.
        max_new_tokens: longest answer in tokens.
        length_penalty: exponent of the length by which a beam's log-likelihood is divided.
        do_sample: draw tokens instead; what is drawn depends on ``seed`` and the sample's number alone.
        temperature: of the logits, when drawing.
        top_p: draw from the likeliest tokens that together have this probability (Holtzman et al. 2020).
        seed: of the draws.
        num_return: answers a sample: the best beams, or as many draws.
    """

    num_beams: int = 3
    max_new_tokens: int = 256
    length_penalty: float = 1.0
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    num_return: int = 1

    def __post_init__(self) -> None:
        if self.do_sample and self.num_beams > 1:
            raise ValueError(f"--do_sample draws single answers; give --num_beams 1, not {self.num_beams}")
        if not self.do_sample and self.num_return > self.num_beams:
            raise ValueError(
                f"--num_return {self.num_return} needs as many --num_beams (now {self.num_beams}), or --do_sample"
            )
        if not self.temperature > 0 or not 0 < self.top_p <= 1:
            raise ValueError("--temperature must be above 0 and --top_p above 0 and at most 1")


@dataclass(frozen=True)
class Decoded:
    """One generated answer.

    Attributes:
        token_ids: without prompt and end.
        score: of the beam, its log-likelihood over its length to the power of ``length_penalty``; None without beams.
        log_probs: natural logarithm of the model's probability of each token, then of the end where it was reached.
    """

    token_ids: list[int]
    score: float | None
    log_probs: tuple[float, ...] = field(default=(), compare=False)


@torch.inference_mode()
def decode(
    model: SlideVLM,
    prefixes: Sequence[Prefix],
    questions: Sequence[list[int]],
    *,
    stop_ids: list[int],
    decoding: Decoding,
    constraint: Constraint | None = None,
    numbers: Sequence[int] | None = None,
) -> list[list[Decoded]]:
    """Answers to prompts whose beginnings were read before.

    Args:
        model: in evaluation mode.
        prefixes: the beginning of each prompt; the same one may come several times.
        questions: ids of the rest of each prompt, at least one.
        stop_ids: token ids that end an answer.
        decoding: how to search or draw.
        constraint: what answers may be; None for anything.
        numbers: of the samples, which decide with the seed what is drawn; default: 0, 1, …

    Returns:
        ``num_return`` answers for each prompt, the best first; fewer where a constraint allows no more. They are
        shorter than ``max_new_tokens`` where the language model has no positions for so many behind the prompt.

    Raises:
        PromptTooLong: it has none.
    """
    numbers = list(range(len(questions)) if numbers is None else numbers)
    lengths = [len(prefix) + len(question) for prefix, question in zip(prefixes, questions, strict=True)]
    limits = answer_limits(model, lengths, decoding.max_new_tokens)
    if set(limits) != {decoding.max_new_tokens}:  # apart, so that no answer depends on what else is in the batch
        return _decode_by_limit(model, prefixes, questions, stop_ids, decoding, constraint, numbers, limits)
    groups = {id(prefix): place for place, prefix in reversed(list(enumerate(prefixes)))}
    order = sorted(range(len(prefixes)), key=lambda place: groups[id(prefixes[place])])
    rows = _Rows.of(model, [prefixes[place] for place in order], [questions[place] for place in order])
    draws = decoding.num_return if decoding.do_sample else 1
    if draws > 1:
        rows = rows.repeat(draws)
    keys = [(decoding.seed, numbers[place], draw) for place in order for draw in range(draws)]
    with _set_up_for_decoding(model.base_llm, shared=rows.shared > 0):
        found = _generate(model, rows, keys, stop_ids, decoding, constraint)
    grouped = [found[start : start + decoding.num_return] for start in range(0, len(found), decoding.num_return)]
    if constraint is not None:  # beams for which nothing allowed was left hold texts of probability zero
        grouped = [
            [answer for answer in group if constraint.allows(answer.token_ids)] or group[:1] for group in grouped
        ]
    answers = dict(zip(order, grouped, strict=True))
    return [answers[place] for place in range(len(order))]


def _decode_by_limit(
    model: SlideVLM,
    prefixes: Sequence[Prefix],
    questions: Sequence[list[int]],
    stop_ids: list[int],
    decoding: Decoding,
    constraint: Constraint | None,
    numbers: list[int],
    limits: list[int],
) -> list[list[Decoded]]:
    """Answers to prompts, of which those with as much room are decoded together."""
    answers: dict[int, list[Decoded]] = {}
    for limit in sorted(set(limits)):
        places = [place for place, its_limit in enumerate(limits) if its_limit == limit]
        of_these = ([values[place] for place in places] for values in (prefixes, questions, numbers))
        some_prefixes, some_questions, some_numbers = of_these
        found = decode(
            model,
            some_prefixes,
            some_questions,
            stop_ids=stop_ids,
            decoding=replace(decoding, max_new_tokens=limit),
            constraint=constraint,
            numbers=some_numbers,
        )
        answers |= dict(zip(places, found, strict=True))
    return [answers[place] for place in range(len(limits))]


def _generate(
    model: SlideVLM,
    rows: "_Rows",
    keys: list[tuple[int, ...]],
    stop_ids: list[int],
    decoding: Decoding,
    constraint: Constraint | None,
) -> list[Decoded]:
    """The answers to all rows, one after the other."""
    cache = rows.read(model, decoding.num_beams, decoding.max_new_tokens)
    length = rows.input_ids.shape[1]
    recorder = BeamRecorder(decoding.num_beams, stop_ids) if decoding.num_beams > 1 else Recorder()
    processors = choice_processors(decoding, constraint, recorder, keys, prompt_length=length, stop_ids=stop_ids)
    kept = 1 if decoding.do_sample else decoding.num_return
    output = model.base_llm.generate(
        input_ids=rows.input_ids,
        attention_mask=rows.attention_mask,
        past_key_values=cache,
        num_beams=decoding.num_beams,
        num_return_sequences=kept,
        do_sample=False,
        max_new_tokens=decoding.max_new_tokens,
        length_penalty=decoding.length_penalty,
        eos_token_id=stop_ids,
        pad_token_id=stop_ids[0],
        logits_processor=LogitsProcessorList(processors),
        return_dict_in_generate=True,
    )
    ended = [_with_end(answer, stop_ids) for answer in output.sequences[:, length:].tolist()]
    log_probs = recorder.log_probs_of(ended, getattr(output, "beam_indices", None))
    return [_decoded(ids, logs, stop_ids, decoding) for ids, logs in zip(ended, log_probs, strict=True)]


@dataclass(frozen=True)
class _Rows:
    """Prompts, left-padded, whose first columns lie in their prefixes.

    Attributes:
        prefixes: of each row.
        paddings: columns before each.
        shared: columns that no row needs to read again.
        input_ids: (B, L) int64.
        attention_mask: (B, L) int64.
        conditioning: arguments of the decoder in the columns from ``shared`` on, (B, W, …) each.
    """

    prefixes: list[Prefix]
    paddings: list[int]
    shared: int
    input_ids: Tensor
    attention_mask: Tensor
    conditioning: dict[str, Tensor]

    @classmethod
    def of(cls, model: SlideVLM, prefixes: Sequence[Prefix], questions: Sequence[list[int]]) -> "_Rows":
        assert all(questions), "a prompt goes on behind its last visual token"
        lengths = [len(prefix) + len(question) for prefix, question in zip(prefixes, questions, strict=True)]
        columns, shareable = max(lengths), prefixes[0].layers is not None
        # A row with a shorter question reads the end of its prefix again, so that all go on at the same column.
        shared = columns - max(map(len, questions)) if shareable else 0
        input_ids = torch.zeros((len(lengths), columns), dtype=torch.long, device=prefixes[0].input_ids.device)
        attention_mask = torch.zeros_like(input_ids)
        paddings = [columns - length for length in lengths]
        for row, (prefix, question, padding) in enumerate(zip(prefixes, questions, paddings, strict=True)):
            input_ids[row, padding : padding + len(prefix)] = prefix.input_ids
            input_ids[row, padding + len(prefix) :] = input_ids.new_tensor(question)
            attention_mask[row, padding:] = 1
        conditioning = model.embed_text(input_ids[:, shared:])
        for name, values in conditioning.items():
            for row, (prefix, padding) in enumerate(zip(prefixes, paddings, strict=True)):
                begin, end = max(padding, shared), padding + len(prefix)
                values[row, begin - shared : end - shared] = prefix.conditioning[name][begin - padding :]
        return cls(list(prefixes), paddings, shared, input_ids, attention_mask, conditioning)

    def repeat(self, times: int) -> "_Rows":
        """Each row as often, one after the other."""
        tensors = {name: value.repeat_interleave(times, 0) for name, value in self.conditioning.items()}
        ids, mask = (tensor.repeat_interleave(times, 0) for tensor in (self.input_ids, self.attention_mask))
        prefixes, paddings = ([one for one in many for _ in range(times)] for many in (self.prefixes, self.paddings))
        return _Rows(prefixes, paddings, self.shared, ids, mask, tensors)

    def read(self, model: SlideVLM, num_beams: int, more_columns: int) -> Cache:
        """Cache of all columns but the last, which ``generate`` reads itself, with a row for each beam."""
        columns = self.input_ids.shape[1] - 1
        if self.shared:
            cache = self._shared_cache(model, columns - self.shared)
        else:
            cache = DynamicCache(config=model.base_llm.config.get_text_config())
        if columns > self.shared:
            conditioning = {name: value[:, :-1] for name, value in self.conditioning.items()}
            read_columns(model, conditioning, self.attention_mask[:, :columns], cache)
        if self.shared:
            cache.repeat_rows(num_beams, more_columns)
        else:
            cache.batch_repeat_interleave(num_beams)
        return cache

    def _shared_cache(self, model: SlideVLM, capacity: int) -> SharedPrefixCache:
        runs = [list(run) for _, run in groupby(self.prefixes, key=id)]
        paddings = torch.tensor(self.paddings, device=self.input_ids.device)
        sharing = Sharing([len(run) for run in runs], paddings, self.shared)
        return SharedPrefixCache(model.base_llm.config, capacity, [run[0] for run in runs], sharing)


def _decoded(ids: list[int], log_probs: list[float], stop_ids: list[int], decoding: Decoding) -> Decoded:
    score = sum(log_probs) / len(ids) ** decoding.length_penalty if decoding.num_beams > 1 else None
    return Decoded(_until(ids, stop_ids), score, tuple(log_probs))


@contextmanager
def _set_up_for_decoding(llm: PreTrainedModel, *, shared: bool) -> Iterator[None]:
    """Set aside what a checkpoint ships as its generation settings: a repetition penalty, say, sees the prompt too."""
    own, llm.generation_config = llm.generation_config, GenerationConfig()
    try:
        with shared_attention(llm) if shared else nullcontext():
            yield
    finally:
        llm.generation_config = own


def _until(token_ids: list[int], stop_ids: list[int]) -> list[int]:
    end = next((index for index, token in enumerate(token_ids) if token in stop_ids), len(token_ids))
    return token_ids[:end]


def _with_end(token_ids: list[int], stop_ids: list[int]) -> list[int]:
    return token_ids[: len(_until(token_ids, stop_ids)) + 1]


def decode_samples(
    model: SlideVLM,
    tokenizer,
    samples: list[dict],
    *,
    decoding: Decoding,
    constraint: Constraint | None = None,
    numbers: Sequence[int] | None = None,
    rows_at_once: int | None = None,
) -> list[list[Decoded]]:
    """Answers to dataset samples, see :func:`decode`; samples about the same inputs share the reading of them.

    ``rows_at_once`` bounds how many are decoded together; all their prefixes are read together.
    """
    if not samples:
        return []
    stop_ids = Prompt(**model.settings.prompt).stop_ids(tokenizer, model.base_llm)
    prefixes = read_prefixes(model, samples)
    questions = [sample["input_ids"][end_of_markers(sample) :] for sample in samples]
    numbers = list(range(len(samples)) if numbers is None else numbers)
    answers, step = [], rows_at_once or len(samples)
    for start in range(0, len(samples), step):
        part = slice(start, start + step)
        answers += decode(
            model,
            prefixes[part],
            questions[part],
            stop_ids=stop_ids,
            decoding=decoding,
            constraint=constraint,
            numbers=numbers[part],
        )
    return answers


def text_of(tokenizer, answer: Decoded) -> str:
    """The answer as text, without special tokens and blanks around it."""
    return tokenizer.decode(answer.token_ids, skip_special_tokens=True).strip()
