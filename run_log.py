"""The log of a training run: ``log.jsonl`` with a line a step and an evaluation, ``curves.png``, the trackers."""

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm


class RunLog:
    """``log.jsonl``, ``curves.png``, trackers and progress bar of a run; writes on the main process only."""

    def __init__(
        self,
        accelerator: Accelerator,
        run_dir: Path,
        first_step: int,
        num_steps: int,
        project: str,
        flags: dict[str, Any],
    ):
        """Open the log, and a bar of ``num_steps`` steps, and start the trackers, if any, under ``project``.

        Lines after ``first_step`` are of a run that was interrupted later than its checkpoint, and are dropped.
        """
        self.accelerator = accelerator
        self.run_dir = run_dir
        self.path = run_dir / "log.jsonl"
        self.began = self.clock = time.perf_counter()
        try:
            accelerator.init_trackers(
                project, config={k: v for k, v in flags.items() if not isinstance(v, list | NoneType)}
            )
        except _errors_of_wandb() as error:
            raise ValueError(f"--wandb_project {project}: {error} (or set WANDB_MODE=offline)") from error
        if accelerator.is_main_process:
            lines = read_log(self.path)
            kept = [line for line in lines if line["step"] <= first_step and "image_ablation" not in line]
            temporary = self.path.with_name("log.jsonl.writing")
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
            os.replace(temporary, self.path)
        hidden = not accelerator.is_main_process
        self.bar = tqdm(total=num_steps, initial=first_step, unit="step", disable=hidden)

    def step(
        self,
        step: int,
        epoch: float,
        *,
        lr: float,
        loss: float,
        grad_norm: float,
        num_samples: int,
        num_bad: int,
        num_supervised_tokens: int | None = None,
        padding_fraction: float | None = None,
        **more: float,
    ) -> None:
        """One line for an optimizer step; the counts are over all processes, ``lr_<part>`` where it is not ``lr``.

        A language model's step has supervised tokens and padding, an encoder's has not, but may have
        ``data_wait_fraction``, which the bar shows too.
        """
        of_text = {}
        seconds, self.clock = time.perf_counter() - self.clock, time.perf_counter()
        if num_supervised_tokens is not None:
            of_text["supervised_tokens_per_s"] = round(num_supervised_tokens / seconds, 1)
        if padding_fraction is not None:
            of_text["padding_fraction"] = round(padding_fraction, 4)
        self._write(
            {
                "step": step,
                "epoch": round(epoch, 4),
                "loss": loss,
                "lr": lr,
                **more,
                "grad_norm": grad_norm,
                "seconds": round(seconds, 4),
                "samples_per_s": round(num_samples / seconds, 3),
                **of_text,
                "peak_memory_bytes": peak_memory_bytes(),
            }
            | ({"records_left_out": num_bad} if num_bad else {})
        )
        self.bar.update()
        waiting = {"waiting": f"{more['data_wait_fraction']:.0%}"} if "data_wait_fraction" in more else {}
        self.bar.set_postfix(loss=f"{loss:.4f}", **waiting)

    def evaluation(self, step: int, epoch: float, val_loss: float, **metrics: float) -> None:
        """One line for an evaluation, and the curves drawn anew."""
        self._write({"step": step, "epoch": round(epoch, 4), "val_loss": val_loss, **metrics})
        self.draw()
        self.clock = time.perf_counter()  # evaluation is not part of the next step's time

    def close_bar(self) -> None:
        """Leave the progress bar as it is: training is over."""
        self.bar.close()

    def end(self, step: int, image_ablation: Any) -> None:
        """The last line, and what is known only now in ``run.json``: time, memory, whether the image is used.

        Args:
            step: optimizer steps taken.
            image_ablation: an ``ImageAblation``, or None where the check was not made.
        """
        ablation = None if image_ablation is None else asdict(image_ablation)
        if ablation is not None:
            self._write({"step": step, "image_ablation": ablation})
        if not self.accelerator.is_main_process:
            return
        self.draw()
        evaluations = [line for line in read_log(self.path) if "val_loss" in line]
        run = json.loads((self.run_dir / "run.json").read_text()) | {
            "steps_taken": step,
            "seconds_since_start_or_resume": round(time.perf_counter() - self.began, 1),
            "peak_memory_bytes": peak_memory_bytes(),
            **({"lowest_val_loss": min(line["val_loss"] for line in evaluations)} if evaluations else {}),
            **({"image_ablation": ablation} if ablation else {}),
        }
        temporary = self.run_dir / "run.json.writing"
        temporary.write_text(json.dumps(run, indent=2) + "\n")
        os.replace(temporary, self.run_dir / "run.json")  # last of all: it says that the run is finished

    def draw(self) -> None:
        """Draw ``curves.png``."""
        if self.accelerator.is_main_process:
            draw_curves(self.path, self.run_dir / "curves.png")

    def _write(self, line: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        values = {key: value for key, value in line.items() if key != "step"}
        values |= {f"image_ablation/{key}": value for key, value in values.pop("image_ablation", {}).items()}
        self.accelerator.log(values, step=line["step"])


# Flags that a resumed run may change, and that decide what its end is.
OF_THE_END = ("early_stopping_patience", "image_ablation_records")


def finished_line(run_dir: Path, step: int, flags: dict[str, Any]) -> str | None:
    """What to say of a run that is to be resumed and came to its end at this step; None where it has to go on.

    Args:
        run_dir: of the run.
        step: of the checkpoint to resume.
        flags: of this command; with other ones for the end, as for stopping early, a run goes on.
    """
    record, result = run_dir / "run.json", run_dir / "final_model"
    if flags["resume_from_checkpoint"] is None or not record.is_file() or not result.is_dir():
        return None
    run = json.loads(record.read_text())
    if run.get("steps_taken") != step or any(run["arguments"].get(name) != flags.get(name) for name in OF_THE_END):
        return None
    return f"{run_dir} is finished, after {step:,} steps; its result is {result}"


def _errors_of_wandb() -> tuple[type[Exception], ...]:
    """What Weights & Biases raises, where accelerate has imported it."""
    wandb = sys.modules.get("wandb")
    return () if wandb is None else (wandb.errors.Error,)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``log.jsonl``; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def draw_curves(log: Path, picture: Path) -> None:
    """Draw over steps the losses, with the lowest marked, the learning rates, and metrics where there are some."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = read_log(log)
    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "val_loss" in line]
    names = sorted({key for line in evaluations for key in line if key.startswith("val_")} - {"val_loss"})
    metrics = [name for name in names if all(0 <= value <= 1 for value in _series(evaluations, name)[1])]  # one scale
    panels = 3 if metrics else 2
    figure, axes = pyplot.subplots(1, panels, figsize=(5 * panels, 3.5), layout="constrained")
    axes[0].plot(*_series(steps, "loss"), lw=0.8, color="tab:blue", label="training")
    if evaluations:
        axes[0].plot(*_series(evaluations, "val_loss"), "o-", ms=3, color="tab:orange", label="validation")
        _mark_extreme(axes[0], evaluations, "val_loss", min)
    axes[0].set(ylabel=loss_name(lines), yscale="log")
    plain_numbers(axes[0])
    for key in sorted({key for step in steps for key in step if key == "lr" or key.startswith("lr_")}):
        axes[1].plot(*_series(steps, key), label=key.removeprefix("lr_") if key != "lr" else "all else")
    axes[1].set(ylabel="learning rate")
    for key in metrics:
        axes[2].plot(*_series(evaluations, key), "o-", ms=3, label=key.removeprefix("val_"))
        if len(metrics) == 1:
            _mark_extreme(axes[2], evaluations, key, max)
        axes[2].set(ylabel="validation")
    for axis in axes:
        axis.set(xlabel="step")
        if len(axis.lines) > 1 or axis is not axes[1]:
            axis.legend(fontsize="small")
    temporary = picture.with_name("curves.writing.png")
    figure.savefig(temporary, dpi=120)
    pyplot.close(figure)
    os.replace(temporary, picture)


def loss_name(lines: Iterable[Mapping[str, Any]]) -> str:
    """What the losses of a log are, by what its steps say beside them; of runs of several kinds, a loss."""
    told_by = {"supervised_tokens_per_s": "loss per supervised token", "logit_scale": "contrastive loss"}
    steps = (line for line in lines if "loss" in line)
    kinds = {next((kind for key, kind in told_by.items() if key in s), "cross-entropy per label") for s in steps}
    return kinds.pop() if len(kinds) == 1 else "loss"


def plain_numbers(axes: Any) -> None:
    """Write the values of a logarithmic axis as such, not as powers of ten, of which losses span one or two.

    Where 6 to 9 would crowd below the next power, 1, 2 and 5 of each are written; of very many powers, themselves.
    """

    def in_words(value: float, _: int) -> str:
        low, high = axes.get_ylim()
        digits = "123456789" if high < 3 * low else "125" if high < 1000 * low else "1"
        return f"{value:.4g}" if f"{value:.0e}"[0] in digits else ""

    for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        set_formatter(in_words)


def _series(lines: list[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of the lines that have it."""
    having = [line for line in lines if key in line]
    return [line["step"] for line in having], [line[key] for line in having]


def _mark_extreme(axis: Any, evaluations: list[dict[str, Any]], key: str, choose: Callable) -> None:
    """A star at the lowest or highest of the values, the first of equals."""
    line = choose((line for line in evaluations if key in line), key=lambda line: line[key])
    word = "lowest" if choose is min else "highest"
    axis.plot(line["step"], line[key], "*", ms=11, color="tab:red", label=f"{word}, {line[key]:.4g}", zorder=3)


def peak_memory_bytes() -> int:
    """Peak memory of this process: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    factor = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * factor
