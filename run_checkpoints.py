"""Checkpoints that resume a training run exactly, also in another layout of processes, and the folder they lie in.

A checkpoint holds what changes in a run, never the frozen language model::

    checkpoints/step_<n>/trainable.safetensors      weights that learn, whole, by name
    checkpoints/step_<n>/optimizer.safetensors      <parameter name>/<state name>, whole
    checkpoints/step_<n>/random_<rank>.safetensors  random states of each process
    checkpoints/step_<n>/progress.json              step, schedule, optimizer settings, flags, layout of processes

A folder of that name is always whole: it is written, flushed to the disk and deleted under other names. Resumed with as
many processes of the same kind, a run ends with the same weights, on the CPU bit for bit; in another layout weights,
optimizer and order of records go on, and only rounding and dropout differ.
"""

import hashlib
import json
import os
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors import safe_open
from safetensors.torch import save_file

from command_line import check_output_folder
from deepspeed_zero import is_zero, precision
from sharded_weights import load_optimizer_state, load_weights, optimizer_state, whole_on_main, without_unused

# Flags that may differ when a run is resumed; all others decide what it learns.
FREE_ON_RESUME = {"output_dir", "resume_from_checkpoint", "overwrite", "save_steps", "keep_checkpoints", "num_workers"}
FREE_ON_RESUME |= {"wandb_project", "tensorboard", "gradient_checkpointing", "ple_device"}
FREE_ON_RESUME |= {"early_stopping_patience", "image_ablation_records"}
# Places that may have moved; what lies there is compared by its content.
FREE_ON_RESUME |= {"train_json", "val_json", "features_dir", "image_root", "llm_name", "vision_model_name"}
FREE_ON_RESUME |= {"stage1_projector_path"}
# With as many records in a step, these change the rounding only.
SAME_RECORDS_IN_OTHER_BATCHES = {"batch_size", "gradient_accumulation_steps"}


class RunState:
    """What a run has reached. One counter, optimizer steps; the epoch and the place in it derive from it.

    Attributes:
        step: optimizer steps taken.
        best_score: of all evaluations; higher is better.
        evaluations_since_best: how many were no better.
    """

    def __init__(self, step: int = 0, best_score: float = float("-inf"), evaluations_since_best: int = 0):
        self.step = step
        self.best_score = best_score
        self.evaluations_since_best = evaluations_since_best

    def note(self, score: float) -> bool:
        """Take down the score of an evaluation; whether it is the best so far."""
        is_best = score > self.best_score
        self.best_score = max(score, self.best_score)
        self.evaluations_since_best = 0 if is_best else self.evaluations_since_best + 1
        return is_best


def run_identity(flags: dict[str, Any], train_batches: Any, *contents: dict[str, Any]) -> dict[str, Any]:
    """What must be the same for a run to be resumed: flags that decide what it learns, size of steps, other content."""
    identity = {name: value for name, value in flags.items() if name not in FREE_ON_RESUME}
    identity |= {name: getattr(train_batches, name) for name in ("steps_per_epoch", "records_per_step")}
    for content in contents:
        identity |= content
    return identity


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def layout(accelerator: Accelerator) -> dict[str, Any]:
    """What must be the same for a resumed run to give the same bits: processes, sharding, device and precision."""
    return {
        "num_processes": accelerator.num_processes,
        "distributed_type": accelerator.distributed_type.value,
        "device": accelerator.device.type,
        "mixed_precision": precision(accelerator),
        **({"zero_stage": accelerator.deepspeed_plugin.zero_stage} if is_zero(accelerator) else {}),
    }


def save_checkpoint(
    accelerator: Accelerator,
    run_dir: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    *,
    state: RunState,
    identity: dict[str, Any],
    keep: int,
) -> None:
    """Write ``checkpoints/step_<n>``, whole or not at all, and delete all but the newest. Collective: every rank.

    Every rank writes its random state into a temporary folder, which gets its name when all have finished. Weights are
    those of the model's ``learned_state()``. Nothing is pickled.
    """
    final = run_dir / "checkpoints" / f"step_{state.step}"
    temporary = final.with_name(final.name + ".writing")
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    weights = whole_on_main(accelerator, accelerator.unwrap_model(model).learned_state().items())
    tensors, groups = optimizer_state(accelerator, model, optimizer)
    _save_random_states(temporary / f"random_{accelerator.process_index}.safetensors")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        save_file(weights, temporary / "trainable.safetensors", metadata={"format": "pt"})
        save_file(tensors, temporary / "optimizer.safetensors", metadata={"format": "pt"})
        progress = {"run": vars(state), "scheduler": scheduler.state_dict(), "optimizer_groups": groups}
        progress |= {"identity": identity, "layout": layout(accelerator)}
        progress["files"] = {path.name: path.stat().st_size for path in temporary.iterdir()}
        (temporary / "progress.json").write_text(json.dumps(progress))
        _flush(temporary)
        delete_folder(final)
        os.replace(temporary, final)
        for old in checkpoints(run_dir)[:-keep]:
            delete_folder(old)
    accelerator.wait_for_everyone()


def _flush(folder: Path) -> None:
    """Force a folder's files to the disk, so that its name never outlives them when the machine stops."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def delete_folder(folder: Path) -> None:
    """Delete a folder that must not be seen half deleted: it loses its name first."""
    going = folder.with_name(folder.name + ".deleting")
    shutil.rmtree(going, ignore_errors=True)
    if folder.exists():
        os.replace(folder, going)
        shutil.rmtree(going)


def _save_random_states(path: Path) -> None:
    """Random states of this process: torch's as tensors, those of Python and numpy, which are numbers, as JSON."""
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda_{number}": state for number, state in enumerate(torch.cuda.get_rng_state_all())}
    kind, keys, *rest = np.random.get_state()
    numbers = {"python": random.getstate(), "numpy": [kind, keys.tolist(), *rest]}
    save_file(tensors, path, metadata={"numbers": json.dumps(numbers)})


def _load_random_states(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        numbers = json.loads(file.metadata()["numbers"])
        torch.set_rng_state(file.get_tensor("cpu"))
        if torch.cuda.is_available():
            torch.cuda.set_rng_state_all([file.get_tensor(f"cuda_{n}") for n in range(torch.cuda.device_count())])
    version, words, gauss = numbers["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = numbers["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))


def checkpoints(run_dir: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = [path for path in (run_dir / "checkpoints").glob("step_*") if path.name.removeprefix("step_").isdigit()]
    return sorted(filter(is_whole, found), key=lambda path: int(path.name.removeprefix("step_")))


def is_whole(folder: Path) -> bool:
    """Whether a checkpoint has all its files in their sizes; a bucket may have received a part of them."""
    if not (folder / "progress.json").is_file():
        return False
    files = _read_progress(folder)["files"]
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in files.items())


RUN_FOLDER_FLAGS = ("output_dir", "overwrite", "resume_from_checkpoint")


def find_run(
    *, output_dir: str, overwrite: bool, resume_from_checkpoint: str | None
) -> tuple[Path, Path | None, RunState]:
    """The run folder, the checkpoint to go on from if any, and what the run had reached by then; changes nothing.

    Raises:
        ValueError: the folder holds a run and neither flag says what to do with it, or both flags were given.
        FileNotFoundError: there is no such checkpoint.
        OSError: no folder can be made or written there.
    """
    run_dir = Path(output_dir)
    if overwrite and resume_from_checkpoint is not None:
        raise ValueError("--overwrite deletes a run and --resume_from_checkpoint goes on with it; give one of them")
    refuse_existing_run(run_dir, overwrite=overwrite, resuming=resume_from_checkpoint is not None)
    checkpoint = checkpoint_to_resume(run_dir, resume_from_checkpoint)
    return run_dir, checkpoint, read_run_state(checkpoint)


def checkpoint_to_resume(run_dir: Path, choice: str | None) -> Path | None:
    """The folder that ``--resume_from_checkpoint`` names: ``latest`` of the run, a path, or None.

    With ``latest``, a run that has no checkpoint yet, or has not begun, begins: one command can be given again and
    again until it has ended.

    Raises:
        FileNotFoundError: there is no such checkpoint.
    """
    if choice is None:
        return None
    folder = next(reversed(checkpoints(run_dir)), None) if choice == "latest" else Path(choice)
    if folder is None:
        print(f"{run_dir} has no checkpoint yet; the run begins", file=sys.stderr)
        return None
    if not is_whole(folder):
        raise FileNotFoundError(
            f"--resume_from_checkpoint {choice}: no such checkpoint, or not all of it; those of this run are under "
            f"{run_dir / 'checkpoints'}"
        )
    return folder


def read_run_state(folder: Path | None) -> RunState:
    """The run state of a checkpoint, or that of a run at its beginning."""
    return RunState() if folder is None else RunState(**_read_progress(folder)["run"])


def check_identity(folder: Path | None, identity: dict[str, Any]) -> None:
    """Refuse to go on from a checkpoint of a run that learns something else.

    Other micro-batches of the same number of records a step are let through: they change rounding only.

    Raises:
        ValueError: names what differs.
    """
    if folder is None:
        return
    had = _read_progress(folder)["identity"]
    different = [name for name in had | identity if had.get(name) != json.loads(json.dumps(identity.get(name)))]
    if not set(different) - SAME_RECORDS_IN_OTHER_BATCHES:
        return
    was = ", ".join(_difference(name, had.get(name), identity.get(name)) for name in different[:3])
    advice = "resume with what it began with, or begin anew"
    if "records_per_step" in different:
        advice += "; records_per_step is --batch_size x --gradient_accumulation_steps x processes"
    raise ValueError(f"{folder} is of another run: {was}; {advice}")


CONTENTS = {
    "records": "the training records",
    "val_records": "the validation records",
    "inputs": "the feature files or images",
    "llm": "the language model",
    "encoder": "the image encoder",
    "stage1_projector": "the projector of stage 1",
}


def _difference(name: str, had: Any, has: Any) -> str:
    """What is said of one entry of an identity; digests would tell a reader nothing."""
    if name in CONTENTS and None not in (had, has):
        return f"{CONTENTS[name]} (by content) were others"
    return f"{name} was {had!r:.20} and is {has!r:.20}"


def begin_or_resume(
    accelerator: Accelerator,
    run_dir: Path,
    checkpoint: Path | None,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    *,
    overwrite: bool,
) -> None:
    """Make the run folder, and load the checkpoint if there is one. Collective; call it when all is prepared.

    What an earlier run left is deleted with ``overwrite``, unless the run goes on from a checkpoint.
    """
    begin_run_dir(accelerator, run_dir, overwrite=overwrite and checkpoint is None)
    if checkpoint:
        load_checkpoint(accelerator, run_dir, checkpoint, model, optimizer, scheduler)


def load_checkpoint(
    accelerator: Accelerator,
    run_dir: Path,
    folder: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
) -> None:
    """Load weights, optimizer, schedule and random states of a checkpoint. Collective: call on every rank.

    A checkpoint of another layout gives all but the random states, which are drawn anew from seed, step and rank.
    Later checkpoints of the run are deleted: it goes on from here.

    Raises:
        ValueError: it is of a run with other trainable weights.
    """
    progress = _read_progress(folder)
    try:
        with safe_open(folder / "optimizer.safetensors", framework="pt") as states:
            bare = accelerator.unwrap_model(model)
            learning = [name for name, parameter in bare.named_parameters() if parameter.requires_grad]
            groups, unused = without_unused(progress["optimizer_groups"], states.keys(), learning)
            with safe_open(folder / "trainable.safetensors", framework="pt") as file:
                own = bare.learned_state()
                names = [name for name in file.keys() if name in own or name.removeprefix("average.") not in unused]
                load_weights(own, names, file.get_tensor)
            load_optimizer_state(accelerator, model, optimizer, states.keys(), states.get_tensor, groups)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    scheduler.load_state_dict(progress["scheduler"])
    step = progress["run"]["step"]
    if progress["layout"] == layout(accelerator):
        _load_random_states(folder / f"random_{accelerator.process_index}.safetensors")
    else:
        set_seed((1_000_003 * step + progress["identity"].get("seed", 0)) % 2**31, device_specific=True)
        if accelerator.is_main_process:
            was = ", ".join(f"{name} {value}" for name, value in progress["layout"].items())
            now = ", ".join(f"{name} {value}" for name, value in layout(accelerator).items())
            print(
                f"{folder} was written with {was}; it goes on with {now}, not bit for bit as it would have",
                file=sys.stderr,
            )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for later in checkpoints(run_dir):
            if int(later.name.removeprefix("step_")) > step:
                delete_folder(later)


def _read_progress(folder: Path) -> dict[str, Any]:
    progress = json.loads((folder / "progress.json").read_text())
    if "layout" not in progress:
        raise ValueError(f"{folder}: written by an earlier version; begin the run anew, or go on with that version")
    return progress


def refuse_existing_run(run_dir: Path, *, overwrite: bool, resuming: bool) -> None:
    """Refuse a folder that holds a run unless it is resumed or overwritten.

    Raises:
        ValueError: the folder holds a run and neither flag was given.
        OSError: it is a file, or no folder can be made or written there.
    """
    check_output_folder(run_dir)
    if (run_dir / "log.jsonl").exists() and not overwrite and not resuming:
        raise ValueError(
            f"--output_dir {run_dir} holds a run; add --resume_from_checkpoint latest to go on, or --overwrite"
        )


def begin_run_dir(accelerator: Accelerator, run_dir: Path, *, overwrite: bool) -> None:
    """Make the run folder, emptied of an earlier run if asked. Collective; call it when nothing is left to refuse.

    What a kill left half written or half deleted is cleared away.
    """
    if accelerator.is_main_process:
        if overwrite:
            for name in ("checkpoints", "best_model", "final_model"):
                delete_folder(run_dir / name)
            (run_dir / "log.jsonl").unlink(missing_ok=True)
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"--output_dir {run_dir} cannot be made ({error.strerror}); name another folder"
            ) from error
        for pattern in ("*.writing", "*.deleting"):
            for leftover in (*run_dir.glob(pattern), *(run_dir / "checkpoints").glob(pattern)):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    accelerator.wait_for_everyone()
