"""Exponential moving average of the projector (EMA), which is evaluated and saved in the place of the last weights.

Kept in ``model.projector_average``, by parameter name, so that checkpoints hold it with what learns; in shards with
FSDP2, whole on every process otherwise.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from deepspeed_zero import gathered
from slide_vlm import SlideVLM


def begin_average(model: SlideVLM, decay: float) -> None:
    """Start the average at the weights as they are; none for a decay of 0. Call it when they are on their device.

    Raises:
        ValueError: projector, reducer and position codes are frozen.
    """
    if not decay:
        return
    learned = model.visual_parameters()
    if not learned:
        raise ValueError("--projector_ema averages a projector that learns; add --unfreeze_projection_layer")
    with gathered(learned.values()):
        model.projector_average = {name: value.detach().clone() for name, value in learned.items()}


@torch.no_grad()
def update_average(model: SlideVLM, decay: float, step: int) -> None:
    """Move the average, where there is one, towards the weights after optimizer step ``step``, counted from 1.

    The first steps weigh more, ``min(decay, (1 + step) / (10 + step))``, as in TensorFlow's ExponentialMovingAverage:
    otherwise a short run would end close to its random beginning.
    """
    if model.projector_average is None:
        return
    decay = min(decay, (1 + step) / (10 + step))
    learned = model.visual_parameters()
    with gathered(learned.values()):
        for name, value in learned.items():
            model.projector_average[name].lerp_(value.detach().to(model.projector_average[name].dtype), 1 - decay)


@contextmanager
def averaged(model: SlideVLM) -> Iterator[None]:
    """Within, the projector has its averaged weights, where there is an average; after it, its own, bit for bit."""
    average = model.projector_average or {}
    learned = {name: value for name, value in model.visual_parameters().items() if name in average}
    own = {}
    with gathered(learned.values(), to_change=True), torch.no_grad():
        for name, value in learned.items():
            own[name] = value.detach().clone()
            value.copy_(average[name])
    try:
        yield
    finally:
        with gathered(learned.values(), to_change=True), torch.no_grad():
            for name, value in learned.items():
                value.copy_(own[name])
