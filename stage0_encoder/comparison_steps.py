"""The steps of one encoder in a comparison: commands of ours in processes of their own, each done once."""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from command_line import DONE, INTERRUPTED, SOME_FAILED
from slide_features import atomic_path

ROOT = Path(__file__).resolve().parent.parent
JOURNAL = "steps.json"
TRAIN, ENCODE, STAGE1, STAGE2, PREDICT, SCORE = "train", "encode", "stage1", "stage2", "predict", "score"
TRAINING = (TRAIN, STAGE1, STAGE2)


class StepFailed(Exception):
    """A command failed; says which, and its last words."""


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: of the step.
        script: below the repository root.
        words: its flags.
    """

    name: str
    script: str
    words: tuple[str, ...]

    def resumed(self, *, anew: bool) -> list[str]:
        """The flags that go on where the command stopped, or begin it anew."""
        if self.name == SCORE:
            return []
        if anew:
            return ["--overwrite"]
        return ["--resume_from_checkpoint", "latest"] if self.name in TRAINING else []


def words_of(flags: dict[str, Any]) -> tuple[str, ...]:
    """Flags by name as the words of a command; what is None or False is left out."""
    words: list[str] = []
    for name, value in flags.items():
        if value is None or value is False:
            continue
        words.append(f"--{name}")
        if value is not True:
            words += [str(item) for item in (value if isinstance(value, list | tuple) else [value])]
    return tuple(words)


def plan_steps(
    entry: dict[str, Any], folder: Path, data: dict[str, Any], settings: dict[str, dict[str, Any]], *, seed: int
) -> list[Step]:
    """The steps of one encoder, in order.

    Args:
        entry: of the recipe: `encoder`, or `train`.
        folder: of the encoder's results.
        data: train_json, val_json, test_json, slides or image_root; and references and training_reports for score.py.
        settings: flags by step: train_classifier, stage0, stage1, stage2, predict, score.
        seed: of all training.
    """
    steps = []
    encoder = entry.get("encoder")
    training = {key: data[key] for key in ("train_json", "val_json")}
    if entry.get("train") is not None:
        flags = training | {"seed": seed} | settings["train_classifier"] | entry["train"]
        steps.append(_step(TRAIN, "stage0_encoder/train_classifier.py", flags | {"output_dir": folder / "encoder"}))
        encoder = str(folder / "encoder" / "final_model")
    if data["image_root"]:
        inputs, named = {"image_root": data["image_root"]}, {"vision_model_name": encoder}
    else:
        flags = {"slides": data["slides"]} | settings["stage0"] | {"encoder": encoder, "output_dir": folder / "stage0"}
        steps.append(_step(ENCODE, "stage0_tiling/encode.py", flags))
        inputs, named = {"features_dir": folder / "stage0" / "features"}, {}
    common = training | inputs | {"seed": seed}
    result, predictions = "final_model", folder / "predictions.json"
    steps += [
        _step(STAGE1, "stage1_projector/train.py", common | named | settings["stage1"], folder / "stage1"),
        _step(
            STAGE2,
            "stage2_finetune/train.py",
            common | {"stage1_projector_path": folder / "stage1" / result} | settings["stage2"],
            folder / "stage2",
        ),
        _step(
            PREDICT,
            "inference/predict.py",
            {"model": folder / "stage2" / result, "test_json": data["test_json"]}
            | inputs
            | settings["predict"]
            | {"output": predictions},
        ),
        _step(
            SCORE,
            "evaluation/score.py",
            {"predictions": predictions, "references": data["references"], "train_json": data["training_reports"]}
            | settings["score"],
            folder / "scores",
        ),
    ]
    return steps


def _step(name: str, script: str, flags: dict[str, Any], output_dir: Path | None = None) -> Step:
    return Step(name, script, words_of(flags | ({"output_dir": output_dir} if output_dir else {})))


def encoder_of(steps: Sequence[Step]) -> str:
    """The name or folder of the encoder that the steps are about."""
    for step in steps:
        for flag in ("--vision_model_name", "--encoder"):
            if step.name in (ENCODE, STAGE1) and flag in step.words:
                return step.words[step.words.index(flag) + 1]
    raise ValueError("no step names an encoder")


def do_steps(steps: Sequence[Step], folder: Path, num_processes: int, *, overwrite: bool, on_step: Any) -> None:
    """Do the steps that were not done with the same flags, and all after the first of them.

    ``steps.json`` of the folder says what was done; what a command prints is in ``<step>.log``. A command that was
    interrupted goes on where it stopped; one that was done with other flags, or after another step, begins anew.

    Args:
        steps: in order.
        folder: of the encoder.
        num_processes: of each command but score.py.
        overwrite: do all anew.
        on_step: a progress bar, moved on after each.

    Raises:
        StepFailed: a command failed.
        KeyboardInterrupt: a command was interrupted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    journal = read_journal(folder)
    if overwrite:
        _forget(journal, steps)
    for number, step in enumerate(steps):
        on_step.set_postfix_str(f"{folder.name}: {step.name}")
        known = journal.get(step.name)
        if known and known["words"] != list(step.words):
            _forget(journal, steps[number:])
        if not known or known["stale"] or known["status"] not in (DONE, SOME_FAILED):
            _forget(journal, steps[number + 1 :])
            _do(step, folder, num_processes, journal)
        on_step.update()


def read_journal(folder: Path) -> dict[str, dict[str, Any]]:
    """What was done of an encoder's steps: words, status (None: not ended), seconds of all tries, whether stale."""
    path = folder / JOURNAL
    return json.loads(path.read_text()) if path.is_file() else {}


def _forget(journal: dict[str, dict[str, Any]], steps: Sequence[Step]) -> None:
    for step in steps:
        if step.name in journal:
            journal[step.name] |= {"stale": True, "seconds": 0.0}


def _do(step: Step, folder: Path, num_processes: int, journal: dict[str, dict[str, Any]]) -> None:
    known = journal.get(step.name) or {"stale": False, "seconds": 0.0}
    anew, before = known["stale"], known["seconds"]
    journal[step.name] = {"words": list(step.words), "status": None, "seconds": before, "stale": anew}
    _write_journal(folder, journal)
    command = [sys.executable]
    if num_processes > 1 and step.name != SCORE:
        command += ["-m", "accelerate.commands.launch", "--num_processes", str(num_processes)]
    command += [str(ROOT / step.script), *step.words, *step.resumed(anew=anew)]
    began, log = time.perf_counter(), folder / f"{step.name}.log"
    with log.open("w", encoding="utf-8") as file:
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
    seconds = round(before + time.perf_counter() - began, 1)
    ended = status in (DONE, SOME_FAILED)
    journal[step.name] |= {"status": status, "seconds": seconds, "stale": anew and not ended}
    _write_journal(folder, journal)
    if status in (INTERRUPTED, -2):
        raise KeyboardInterrupt
    if not ended:
        raise StepFailed(f"{step.script} left with {status}: {last_words(log)} (see {log})")


def last_words(log: Path) -> str:
    """The last line of a log that says something, without a progress bar's."""
    lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
    said = [line.strip() for line in lines if line.strip()]
    errors = [line for line in said if line.startswith(("error: ", "Error", "RuntimeError"))]
    return (errors or said or ["nothing"])[-1][:600]


def _write_journal(folder: Path, journal: dict[str, dict[str, Any]]) -> None:
    with atomic_path(folder / JOURNAL) as partial:
        partial.write_text(json.dumps(journal, indent=1) + "\n")
