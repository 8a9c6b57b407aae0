r"""Fine-tune with LoRA and with QLoRA on the same data, one after the other, and put the two side by side.

  python stage2_finetune/compare_peft.py --train_json reports.json --features_dir OUT/features \
      --stage1_projector_path runs/stage1/final_model --output_dir runs/lora_or_qlora

Takes the flags of stage2_finetune/train.py, and runs it once a method. Writes into --output_dir: a run folder a method,
comparison.csv, comparison.json, comparison.md, and comparison.png with their losses over time.
"""

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from jsonargparse.typing import PositiveInt

from accelerator_setup import runs_on_cpu
from command_line import DONE, INTERRUPTED, check_output_folder, defaults_of, flags_of, idle_flags, make_parser, run
from run_log import plain_numbers, read_log
from slide_features import atomic_path
from stage2_finetune.train import add_arguments
from stage2_finetune.what_learns import needs_of_flags

OWN_FLAGS = ("methods", "num_processes", "llm_training", "output_dir", "config")
TRAIN = Path(__file__).with_name("train.py")
COLUMNS = {
    "method": "",
    "final_val_loss": "per supervised token",
    "lowest_val_loss": "per supervised token",
    "steps": "",
    "step_seconds": "median",
    "train_seconds": "whole command",
    "peak_memory_mb": "GPU, or resident without one",
    "trainable_parameters": "",
}


def parse_arguments():
    parser = make_parser(__doc__)
    group = parser.add_argument_group("Comparison")
    group.add_argument(
        "--methods",
        nargs="+",
        choices=["lora", "qlora", "full", "frozen"],
        default=["lora", "qlora"],
        help="to compare",
    )
    group.add_argument("--num_processes", type=PositiveInt, default=1, help="of each run, on this machine")
    add_arguments(parser)
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    check_output_folder(args.output_dir)
    output = Path(args.output_dir)
    rows, logs = [], {}
    for method, idle in idle_by_method(args).items():
        flags = {name: value for name, value in flags_of(args).items() if name not in OWN_FLAGS and value is not None}
        for name in idle:
            flags.pop(name, None)
        run_dir = output / method
        if not (run_dir / "log.jsonl").exists():  # this method's turn had not come
            flags.pop("resume_from_checkpoint", None)
        print(f"--llm_training {method}, in {run_dir}", file=sys.stderr, flush=True)
        seconds = train(flags | {"llm_training": method, "output_dir": str(run_dir)}, args.num_processes, output)
        logs[method] = read_log(run_dir / "log.jsonl")
        rows.append(summary(method, run_dir, logs[method], seconds))
    write_tables(rows, output)
    draw(logs, output / "comparison.png")
    print((output / "comparison.md").read_text(), end="")
    return DONE


def idle_by_method(args) -> dict[str, list[str]]:
    """The methods to compare, in order, and for each the flags that are there for others of them only.

    A flag that no method has a use for is left to the first run, which refuses it.

    Raises:
        ValueError: ``--llm_training`` is given, which the methods stand for.
    """
    defaults = defaults_of(add_arguments)
    if args.llm_training != defaults["llm_training"]:
        raise ValueError(f"--llm_training {args.llm_training}: say with --methods what to compare")
    idle = {}
    for method in args.methods:
        of_method = args.clone()
        of_method.llm_training = method
        found = idle_flags(of_method, defaults, needs_of_flags(of_method))
        idle[method] = {name for names in found.values() for name in names}
    of_no_use = set.intersection(*idle.values())
    return {method: sorted(names - of_no_use) for method, names in idle.items()}


def train(flags: dict[str, Any], num_processes: int, output: Path) -> float:
    """Run train.py in a process of its own, whose peak memory is then its own too; the seconds it took.

    Of a run that was resumed and had nothing left to do, they are those of the time before.

    Raises:
        ValueError: it refused or failed; it has said why on stderr.
    """
    output.mkdir(parents=True, exist_ok=True)
    config = output / f"{flags['llm_training']}.yaml"
    config.write_text(json.dumps(flags, indent=1))  # JSON is YAML
    began, began_ns = time.perf_counter(), time.time_ns()
    command = [*launcher(num_processes), str(TRAIN), "--config", str(config)]
    status = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
    if status in (INTERRUPTED, -2):
        raise KeyboardInterrupt
    # Launchers leave with 1 whatever their processes left with, so the run itself must say that it has ended.
    run_dir, seconds = Path(flags["output_dir"]), time.perf_counter() - began
    if status in (0, 1) and has_ended(run_dir, began_ns):
        return seconds
    if status == 0 and has_ended(run_dir, 0):
        return json.loads((run_dir / "run.json").read_text())["seconds_since_start_or_resume"]
    raise ValueError(f"{TRAIN.name} with --llm_training {flags['llm_training']} left with {status}; see above")


def launcher(num_processes: int) -> list[str]:
    """What starts a script of this project in so many processes."""
    if num_processes == 1:
        return [sys.executable]
    if runs_on_cpu():  # where `accelerate launch` starts a single one, whatever it is asked for
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    return [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(num_processes)]


def has_ended(run_dir: Path, since_ns: int) -> bool:
    """Whether a run has come to its end after a moment, in nanoseconds of the clock."""
    facts = run_dir / "run.json"
    return facts.is_file() and facts.stat().st_mtime_ns >= since_ns and "steps_taken" in json.loads(facts.read_text())


def summary(method: str, run_dir: Path, log: list[dict], seconds: float) -> dict[str, Any]:
    """A row of the table."""
    facts = json.loads((run_dir / "run.json").read_text())
    val_losses = [line["val_loss"] for line in log if "val_loss" in line]
    steps = [line for line in log if "loss" in line]
    times = sorted(line["seconds"] for line in steps)
    learning = sum(int(count.split(" / ")[0].replace(",", "")) for count in facts["trainable_parameters"].values())
    return {
        "method": method,
        "final_val_loss": round(val_losses[-1], 4) if val_losses else None,
        "lowest_val_loss": round(min(val_losses), 4) if val_losses else None,
        "steps": len(steps),
        "step_seconds": round(times[len(times) // 2], 4),
        "train_seconds": round(seconds, 1),
        "peak_memory_mb": round(max(line["peak_memory_bytes"] for line in steps) / 1e6, 1),
        "trainable_parameters": learning,
    }


def write_tables(rows: list[dict[str, Any]], output: Path) -> None:
    with atomic_path(output / "comparison.json") as partial:
        partial.write_text(json.dumps(rows, indent=1) + "\n")
    with atomic_path(output / "comparison.csv") as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(COLUMNS))
        writer.writeheader()
        writer.writerows(rows)
    heads = [name.replace("_", " ") + (f" ({unit})" if unit else "") for name, unit in COLUMNS.items()]
    lines = [heads, ["---"] * len(heads), *([str(row[name]) for name in COLUMNS] for row in rows)]
    with atomic_path(output / "comparison.md") as partial:
        partial.write_text("".join(f"| {' | '.join(line)} |\n" for line in lines))


def draw(logs: dict[str, list[dict]], picture: Path) -> None:
    """Draw training (thin) and validation loss (dots) of each method over the seconds it trained."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for number, (method, log) in enumerate(logs.items()):
        passed, curve, evaluations = 0.0, [], []
        for line in log:
            if "loss" in line:
                passed += line["seconds"]
                curve.append((passed, line["loss"]))
            elif "val_loss" in line:
                evaluations.append((passed, line["val_loss"]))
        axes.plot(*zip(*curve, strict=True), lw=0.7, alpha=0.6, color=f"C{number}")
        if evaluations:
            axes.plot(*zip(*evaluations, strict=True), "o-", ms=4, color=f"C{number}", label=f"{method}, validation")
        else:
            axes.plot([], [], color=f"C{number}", label=f"{method}, training")
    axes.set(xlabel="seconds of training", ylabel="loss per supervised token", yscale="log")
    plain_numbers(axes)
    axes.legend()
    temporary = picture.with_name("comparison.writing.png")
    figure.savefig(temporary, dpi=120)
    pyplot.close(figure)
    os.replace(temporary, picture)


if __name__ == "__main__":
    run(main, to_go_on="add --resume_from_checkpoint latest to go on")
