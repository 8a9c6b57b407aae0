"""Which token comes next: constraints on answers, and draws that depend on a sample and not on its batch."""

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
    keys: Sequence[tuple[int, ...]],
    *,
    prompt_length: int,
    stop_ids: list[int],
) -> list[LogitsProcessor]:
    """What changes the logits before a token is chosen, in order; ``keys`` has one of each row that is drawn."""
    processors: list[LogitsProcessor] = []
    if constraint is not None:
        beams = decoding.num_beams
        processors.append(constraint.processor(num_beams=beams, prompt_length=prompt_length, stop_ids=stop_ids))
    if decoding.do_sample:
        if decoding.temperature != 1:
            processors.append(TemperatureLogitsWarper(float(decoding.temperature)))
        if decoding.top_p < 1:
            processors.append(TopPLogitsWarper(decoding.top_p))
        processors.append(GumbelNoise(keys))
    return processors
