"""Which token comes next: constraints on answers, and draws that depend on a sample and not on its batch."""

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import LogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper


class Constraint(Protocol):
    """What answers may be."""

    def processor(self, *, num_beams: int, prompt_length: int, stop_ids: list[int]) -> LogitsProcessor:
        """What sets the logits of tokens to minus infinity that may not come next."""

    def allows(self, token_ids: list[int]) -> bool:
        """Whether an answer may be, or become, of the allowed kind."""


class Recorder(LogitsProcessor):
    """Remembers the log-probability that the model gave to each token that was chosen, without beams.

    It sees the logits before anything changes them. ``generate`` itself would keep the logits of all steps.
    """

    def __init__(self) -> None:
        self.steps: list[Tensor] = []
        self.last: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._take(input_ids[:, -1])
        self.last = scores.log_softmax(-1)
        return scores

    def _take(self, chosen: Tensor) -> None:
        if self.last is not None:
            self.steps.append(self.last.gather(1, chosen[:, None]).squeeze(1))

    def log_probs_of(self, answers: list[list[int]], beam_indices: Tensor | None) -> list[list[float]]:
        """Of the tokens of each answer, in order of the rows."""
        longest = max(map(len, answers))
        if len(self.steps) < longest:  # nothing came after the last token
            at_end = [answer[-1] if len(answer) == longest else 0 for answer in answers]
            self._take(torch.tensor(at_end, device=self.last.device))
        table = torch.stack(self.steps, dim=1).tolist()
        return [row[: len(answer)] for row, answer in zip(table, answers, strict=True)]


class BeamRecorder(LogitsProcessor):
    """The same with beams: keeps the likeliest continuations of each, among which the search chooses."""

    def __init__(self, num_beams: int, stop_ids: list[int]):
        self.candidates = max(2, 1 + len(stop_ids)) * num_beams  # as many as transformers looks at
        self.steps: list[tuple[Tensor, Tensor]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.steps.append(tuple(scores.topk(min(self.candidates, scores.shape[1]), dim=1)))
        return scores

    def log_probs_of(self, answers: list[list[int]], beam_indices: Tensor | None) -> list[list[float]]:
        """Of the tokens of each answer, whose beams at each step are in ``beam_indices`` (answers, steps)."""
        found = []
        for answer, beams in zip(answers, beam_indices.tolist(), strict=True):
            logs = []
            for (values, tokens), token, beam in zip(self.steps, answer, beams, strict=False):
                place = (tokens[beam] == token).nonzero()
                logs.append(float(values[beam, place[0, 0]]) if len(place) else -math.inf)
            found.append(logs)
        return found


class GumbelNoise(LogitsProcessor):
    """Noise that makes the greedy choice a draw from the softmax of the logits (Gumbel-max, Gumbel 1954).

    Each row has a generator of its own, seeded by its key, so what is drawn does not depend on which rows are decoded
    together.
    """

    def __init__(self, keys: Sequence[tuple[int, ...]]):
        self.generators = [torch.Generator().manual_seed(_seed_of(key)) for key in keys]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniform = [torch.rand(scores.shape[1], generator=own, dtype=torch.float64) for own in self.generators]
        noise = -torch.log(-torch.log(torch.stack(uniform).clamp(min=1e-300)))
        return scores + noise.to(scores)


def _seed_of(key: tuple[int, ...]) -> int:
    """A seed for each key: different keys have, as good as always, different ones."""
    import numpy as np

    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def choice_processors(
    decoding: Any,
    constraint: Constraint | None,
    recorder: Recorder | BeamRecorder,
    keys: Sequence[tuple[int, ...]],
    *,
    prompt_length: int,
    stop_ids: list[int],
) -> list[LogitsProcessor]:
    """What changes the logits before a token is chosen, in order; ``keys`` has one of each row that is drawn."""
    processors: list[LogitsProcessor] = [recorder] if isinstance(recorder, Recorder) else []
    if constraint is not None:
        beams = decoding.num_beams
        processors.append(constraint.processor(num_beams=beams, prompt_length=prompt_length, stop_ids=stop_ids))
    if isinstance(recorder, BeamRecorder):  # what is not allowed is no candidate
        processors.append(recorder)
    if decoding.do_sample:
        if decoding.temperature != 1:
            processors.append(TemperatureLogitsWarper(float(decoding.temperature)))
        if decoding.top_p < 1:
            processors.append(TopPLogitsWarper(decoding.top_p))
        processors.append(GumbelNoise(keys))
    return processors
