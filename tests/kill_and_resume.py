r"""Kill training at random moments, resume it, and compare its weights with those of a run that was left alone.

    OMP_NUM_THREADS=1 python -m tests.kill_and_resume --kills 20

Stage 1 and stage 2 (LoRA with dropout, projector learning), on one process and on two; every run is killed with SIGKILL
at moments drawn over its whole duration, resumed with `--resume_from_checkpoint latest`, possibly killed again, and
must end with the same bits in every weight of `final_model`. After each kill, every folder with a checkpoint's name is
opened. Prints a line of JSON for each stage and number of processes.
"""

import argparse
import json
import random
import shutil
import tempfile
import time
from pathlib import Path

from safetensors.torch import load_file

import stage1_projector.train
import stage2_finetune.train
from run_checkpoints import checkpoints
from tests.conftest import Corpus, make_corpus
from tests.forked_runs import ForkedRun, finish_run, fork_run, kill_after

MAINS = {1: stage1_projector.train.main, 2: stage2_finetune.train.main}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of each stage and number of processes (default: 20)")
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2], help="default: 1 2")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="default: 1 2")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        corpus = make_corpus_in_fork(root / "corpus")
        stage1 = root / "stage1"
        finish_run(MAINS[1], [*flags_of_stage(1, corpus, stage1), "--output_dir", stage1], root / "stage1.txt")
        for stage in args.stages:
            for processes in args.processes:
                flags = flags_of_stage(stage, corpus, stage1)
                work = root / f"{stage}_{processes}"
                work.mkdir()
                found = soak(stage, flags, work, processes=processes, kills=args.kills, seed=args.seed)
                print(json.dumps({"stage": stage, "processes": processes} | found), flush=True)


def make_corpus_in_fork(root: Path) -> Corpus:
    """Make the corpus in a fork, since this process must compute nothing before it forks."""

    def make() -> int:
        make_corpus(root)
        return 0

    root.mkdir(parents=True)
    finish_run(make, [], root.with_suffix(".txt"))
    places = {name: root / name for name in ("llm", "features", "images", "encoder")}
    return Corpus(**places, **{name: root / f"{name}.json" for name in ("reports", "captions", "questions")})


def flags_of_stage(stage: int, corpus: Corpus, stage1: Path) -> list:
    """Two epochs of ten steps, with a checkpoint every third step and at the end of each."""
    flags = ["--train_json", corpus.reports, "--features_dir", corpus.features, "--num_workers", 0]
    flags += ["--batch_size", 2, "--num_epochs", 2, "--save_steps", 3]
    if stage == 1:
        return [*flags, "--llm_name", corpus.llm, "--num_visual_tokens", 8, "--learning_rate", 0.01]
    flags += ["--stage1_projector_path", stage1 / "final_model", "--llm_training", "lora", "--lora_dropout", 0.2]
    return [*flags, "--unfreeze_projection_layer"]


def soak(stage: int, flags: list, work: Path, *, processes: int, kills: int, seed: int) -> dict:
    """Kill and resume until so many kills have hit; AssertionError at the first weight or checkpoint that is wrong."""
    draw = random.Random(f"{seed} {stage} {processes}")
    whole, killed = work / "whole", work / "killed"
    times = timed_run(MAINS[stage], [*flags, "--output_dir", whole], whole, processes)
    expected = weights_of(whole)
    command = [*flags, "--output_dir", killed, "--resume_from_checkpoint", "latest"]
    hits, opened, runs, half_written, at = 0, 0, 0, 0, []  # of kills, checkpoints, runs, folders; lines of the log
    while hits < kills:
        shutil.rmtree(killed, ignore_errors=True)
        runs += 1
        for _ in range(draw.choice([1, 1, 2])):  # some runs are killed again while they resume
            run = fork_run(MAINS[stage], command, work / "killed.txt", processes=processes)
            moment = draw.uniform(0, len(times))
            wait_for_lines(run, killed, int(moment))
            if kill_after(run, moment % 1 * times[int(moment)]):
                hits += 1
                at.append(lines_of(killed))
            half_written += len(list(killed.glob("**/*.writing")))
            opened += open_all(killed)
        finish_run(MAINS[stage], command, work / "killed.txt", processes=processes)
        found = weights_of(killed)
        assert found.keys() == expected.keys()
        different = [name for name in expected if not found[name].equal(expected[name])]
        assert not different, f"stage {stage}, {processes} processes, killed after {at[-1:]} lines: {different[0]}"
        assert steps_of(killed) == steps_of(whole)
        assert not [*killed.glob("**/*.writing"), *killed.glob("**/*.deleting")]
    return {
        "kills": hits,
        "runs": runs,
        "weights": len(expected),
        "lines_of_log_when_killed": at,
        "checkpoints_opened": opened,
        "left_half_written_under_other_names": half_written,
        "seconds_of_whole_run": round(sum(times), 1),
    }


def weights_of(run: Path) -> dict:
    """Every weight of the result."""
    files = sorted((run / "final_model").glob("**/*.safetensors"))
    return {f"{path.parent.name}/{name}": value for path in files for name, value in load_file(path).items()}


def open_all(run: Path) -> int:
    """Open all files of every checkpoint: one that has the name is whole."""
    for folder in checkpoints(run):
        json.loads((folder / "progress.json").read_text())
        for name in ("trainable", "optimizer", "random_0"):
            assert load_file(folder / f"{name}.safetensors")
    return len(checkpoints(run))


def steps_of(run: Path) -> list:
    """Step and loss of every line of the log."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line.get("loss"), line.get("val_loss")) for line in lines]


def lines_of(run: Path) -> int:
    """Whole lines that the log has so far."""
    path = run / "log.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def timed_run(main, command: list, run: Path, processes: int) -> list[float]:
    """Run to the end; seconds until each line of the log, counted from the one before, and until the end."""
    times, last, seen = [], time.monotonic(), 0
    forked = fork_run(main, command, run.with_suffix(".txt"), processes=processes)
    while not forked.has_ended():
        time.sleep(0.005)
        new, now = lines_of(run) - seen, time.monotonic()
        if new:
            times += [(now - last) / new] * new
            seen, last = seen + new, now
    statuses = forked.wait()
    assert set(statuses) == {0}, forked.output.read_text()[-4000:]
    return [*times, time.monotonic() - last]


def wait_for_lines(forked: ForkedRun, run: Path, number: int) -> None:
    """Wait until the log has so many lines, or the run has ended."""
    while lines_of(run) < number and not forked.has_ended():
        time.sleep(0.005)


if __name__ == "__main__":
    main()
