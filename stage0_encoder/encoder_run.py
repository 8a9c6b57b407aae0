"""How the commands that train an encoder begin and end: its weights are never sharded, the main process writes."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast
from torch import nn

from accelerator_setup import ACCELERATOR_FLAGS, freeze_unused, make_accelerator
from command_line import chosen
from encoders import ImageEncoder
from run_checkpoints import RunState
from stage0_encoder.text_encoder import TextEncoder
from validation import stops_early


def make_encoder_accelerator(args, run_dir: Path) -> Accelerator:
    """The Accelerator by the command's flags and by ``accelerate config``.

    Raises:
        ValueError: the configuration shards weights.
    """
    accelerator = make_accelerator(output_dir=run_dir, **chosen(args, ACCELERATOR_FLAGS))
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError("an encoder's weights are not sharded; use recipes/accelerate/ddp.yaml")
    return accelerator


def freeze_unused_of_encoder(encoder: nn.Module) -> None:
    """Freeze what an encoder's vector does not depend on: many published ones have a head or pooler of no use here.

    Args:
        encoder: an `ImageEncoder`, a `TextEncoder`, or a slide encoder.
    """
    device = next((parameter.device for parameter in encoder.parameters() if parameter.requires_grad), None)
    if device is None:
        return
    was_training = encoder.training
    encoder.eval()  # draws nothing at random, and keeps running statistics
    if isinstance(encoder, ImageEncoder):
        output = encoder.encode_tiles(torch.zeros(1, 3, encoder.image_size, encoder.image_size, device=device))
    elif isinstance(encoder, TextEncoder):
        ids = torch.ones(1, 2, dtype=torch.long, device=device)
        output = encoder(ids, ids.bool())
    else:
        cells = torch.zeros(1, 2, 2, dtype=torch.long, device=device)
        output = encoder(torch.zeros(1, 2, encoder.input_width, device=device), cells, cells[..., 0] == 0)
    freeze_unused(encoder, output)
    encoder.train(was_training)


@torch.no_grad()
def share_statistics(accelerator: Accelerator, model: nn.Module) -> None:
    """Give every process the main one's buffers, which it saves: running statistics differ. Collective.

    DDP does so before each forward pass of training, but not for an evaluation on the bare model or on an average.
    """
    if accelerator.num_processes > 1:
        for buffer in model.buffers():
            buffer.copy_(broadcast(buffer))


def is_over(accelerator: Accelerator, args, state: RunState) -> bool:
    """Whether ``--early_stopping_patience`` ends training here, which is then said."""
    if not stops_early(state.evaluations_since_best, args.early_stopping_patience):
        return False
    if accelerator.is_main_process:
        epochs = f"{state.evaluations_since_best} epoch" + "s" * (state.evaluations_since_best > 1)
        print(f"\nstopped early: {epochs} without a better {args.best_metric}", file=sys.stderr)
    return True


def save_result(accelerator: Accelerator, model, folder: Path) -> None:
    """Write a result folder by ``model.save``. Collective: call on every rank."""
    if accelerator.is_main_process:
        model.save(folder)
    accelerator.wait_for_everyone()


def end(accelerator: Accelerator, run_dir: Path, *messages: str) -> None:
    """Print the messages that are not empty, and the result's place on stdout. Collective: call on every rank."""
    if accelerator.is_main_process:
        for message in filter(None, messages):
            print(message, file=sys.stderr)
        print(f"{run_dir / 'final_model'}", file=sys.stdout)
    accelerator.wait_for_everyone()
    accelerator.end_training()
