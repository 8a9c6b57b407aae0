r"""Kill training at random moments, resume it, and compare its weights with those of a run that was left alone.

    OMP_NUM_THREADS=1 python -m tests.kill_and_resume --kills 20

Stage 1, stage 2 (LoRA with dropout, projector learning), the classifier (a CNN with mixup, dropout and a moving average
of its weights) and contrastive training (gated attention and a BERT, both with dropout, in chunks), on one process and
on two. Every run is killed with SIGKILL at moments drawn over its whole duration, resumed with
`--resume_from_checkpoint latest`, possibly killed again, and must end with the same bits in every weight of
`final_model` and `best_model`. After each kill, every folder with a checkpoint's name is opened. Prints a line of JSON
for each command and number of processes.
"""

import argparse
import json
import random
import shutil
import tempfile
import time
from itertools import zip_longest
from pathlib import Path

from safetensors.torch import load_file

import stage0_encoder.train_classifier
import stage0_encoder.train_contrastive
import stage1_projector.train
import stage2_finetune.train
from run_checkpoints import checkpoints
from tests.conftest import Corpus, make_corpus
from tests.forked_runs import ForkedRun, finish_run, fork_run, kill_after
from tests.labelled_pictures import make_pictures
from tests.tiny_models import make_text_model

MAINS = {
    "stage1": stage1_projector.train.main,
    "stage2": stage2_finetune.train.main,
    "classifier": stage0_encoder.train_classifier.main,
    "contrastive": stage0_encoder.train_contrastive.main,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of each command and number of processes (default: 20)")
    parser.add_argument("--commands", nargs="+", choices=list(MAINS), default=list(MAINS), help="default: all")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="default: 1 2")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        corpus = make_corpus_in_fork(root / "corpus")
        for name in args.commands:
            flags = FLAGS[name](corpus, root / name)
            for processes in args.processes:
                work = root / f"{name}_{processes}"
                work.mkdir()
                found = soak(name, flags, work, processes=processes, kills=args.kills, seed=args.seed)
                print(json.dumps({"command": name, "processes": processes} | found), flush=True)


def make_corpus_in_fork(root: Path) -> Corpus:
    """Make the corpus in a fork, since this process must compute nothing before it forks."""

    def make() -> int:
        make_corpus(root)
        return 0

    root.mkdir(parents=True)
    finish_run(make, [], root.with_suffix(".txt"))
    places = {name: root / name for name in ("llm", "features", "images", "encoder")}
    return Corpus(**places, **{name: root / f"{name}.json" for name in ("reports", "captions", "questions")})


# Each command is trained for two epochs of about ten steps, with a checkpoint every third step and at each epoch's end.
LENGTH = ["--num_workers", 0, "--batch_size", 2, "--num_epochs", 2, "--save_steps", 3]


def flags_of_stage1(corpus: Corpus, work: Path) -> list:
    """A linear projector for slides."""
    flags = ["--train_json", corpus.reports, "--features_dir", corpus.features, "--llm_name", corpus.llm]
    return [*flags, *LENGTH, "--num_visual_tokens", 8, "--learning_rate", 0.01]


def flags_of_stage2(corpus: Corpus, work: Path) -> list:
    """LoRA with dropout on a result of stage 1, which is made here."""
    stage1 = work.with_name("stage1_of_stage2")
    finish_run(MAINS["stage1"], [*flags_of_stage1(corpus, work), "--output_dir", stage1], work.with_suffix(".txt"))
    flags = ["--train_json", corpus.reports, "--features_dir", corpus.features, *LENGTH]
    flags += ["--stage1_projector_path", stage1 / "final_model", "--llm_training", "lora", "--lora_dropout", 0.2]
    return [*flags, "--unfreeze_projection_layer"]


def flags_of_classifier(corpus: Corpus, work: Path) -> list:
    """A CNN, whose batch normalisation has running statistics, on pictures that are made here."""
    finish_run(lambda: 0 if make_pictures(work) else 1, [], work.with_suffix(".txt"))
    flags = ["--train_json", work / "labels.csv", "--image_root", work, "--val_fraction", 0.2, *LENGTH]
    flags += ["--encoder", "cnn", "--image_size", 32, "--cnn_width", 4, "--cnn_depths", 1, 1, 1, 1]
    return [*flags, "--mixup", 0.2, "--dropout", 0.1, "--ema_decay", 0.8, "--learning_rate", 0.01]


def flags_of_contrastive(corpus: Corpus, work: Path) -> list:
    """Gated attention over slides and a text model, which is made here; other patches are drawn each epoch."""

    def make() -> int:
        make_text_model(work, dropout=0.1)
        return 0

    finish_run(make, [], work.with_suffix(".txt"))
    flags = ["--train_json", corpus.reports, "--features_dir", corpus.features, *LENGTH, "--batch_size", 3]
    flags += ["--slide_encoder", "abmil", "--slide_width", 16, "--text_model", work, "--num_patches", 8]
    return [*flags, "--embedding_width", 8, "--chunk_size", 2, "--learning_rate", 0.003]


FLAGS = {
    "stage1": flags_of_stage1,
    "stage2": flags_of_stage2,
    "classifier": flags_of_classifier,
    "contrastive": flags_of_contrastive,
}


def soak(name: str, flags: list, work: Path, *, processes: int, kills: int, seed: int) -> dict:
    """Kill and resume until so many kills have hit; AssertionError at the first weight or checkpoint that is wrong."""
    draw = random.Random(f"{seed} {name} {processes}")
    whole, killed = work / "whole", work / "killed"
    times = timed_run(MAINS[name], [*flags, "--output_dir", whole], whole, processes)
    expected = weights_of(whole)
    command = [*flags, "--output_dir", killed, "--resume_from_checkpoint", "latest"]
    hits, opened, runs, half_written, at = 0, 0, 0, 0, []  # of kills, checkpoints, runs, folders; lines of the log
    while hits < kills:
        shutil.rmtree(killed, ignore_errors=True)
        runs += 1
        for _ in range(draw.choice([1, 1, 2])):  # some runs are killed again while they resume
            run = fork_run(MAINS[name], command, work / "killed.txt", processes=processes)
            moment = draw.uniform(0, len(times))
            wait_for_lines(run, killed, int(moment))
            if kill_after(run, moment % 1 * times[int(moment)]):
                hits += 1
                at.append(lines_of(killed))
            half_written += len(list(killed.glob("**/*.writing")))
            opened += open_all(killed)
        finish_run(MAINS[name], command, work / "killed.txt", processes=processes)
        found = weights_of(killed)
        assert found.keys() == expected.keys()
        different = [weight for weight in expected if not found[weight].equal(expected[weight])]
        assert not different, f"{name}, {processes} processes, killed after {at[-1:]} lines: {different[0]}"
        lines = list(zip_longest(steps_of(killed), steps_of(whole)))
        other = [pair for pair in lines if pair[0] != pair[1]]
        assert not other, f"{name}, {processes} processes, killed after {at[-1:]} lines, wrote {other[0]}"
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
    """Every weight of the results, the last and the best."""
    files = sorted(path for result in ("final_model", "best_model") for path in run.glob(f"{result}/**/*.safetensors"))
    return {f"{path.relative_to(run)}/{name}": value for path in files for name, value in load_file(path).items()}


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
