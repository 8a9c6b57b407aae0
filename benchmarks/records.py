r"""How long a million records take to the first batch, and how much memory; reading few of many patch tokens.

    python benchmarks/records.py --json records.json

    million   a REG-style annotation file of a million records on 10,000 slides: seconds from the start of the process
              to the first batch of training, imports included, its CPU time, and its peak resident memory.
    rows      reading 256 of 20,000 patch tokens of width 1536, drawn at random: times faster than reading all and
              choosing then, in CPU time. Higher is better.
    loader    batches of 8 cases of 256 of 5,000 patch tokens of width 1536, by as many workers as training has by
              default. With a model that sleeps 1 ms a sample, and so competes with nobody for the CPU: samples a second
              (1,000 at most) and the share of its time that it waits. Without a model: samples a second. And the CPU
              milliseconds of the workers, and of the process that trains, for a sample. All from the second batch on.

Each figure is the median of the repetitions. Files are read from the page cache, so reading is CPU time, which other
work on the machine disturbs less than it does seconds.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from command_line import make_parser
from slide_features import choose_patches, read_slide_features, write_slide_features

FACTS = {"encoder": "made-up", "mpp": 0.5, "tile_size": 256, "overlap": 0, "patch_size_level0": 256}
REPORT = "Breast, core-needle biopsy;\n  Invasive carcinoma of no special type, grade {grade} (Tubule formation: {n})"
SECONDS_PER_SAMPLE = 0.001


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="which figures")
    parser.add_argument("--num_records", type=int, default=1_000_000, help="of the part `million` (default: 1000000)")
    parser.add_argument("--repeats", type=int, default=5, help="repetitions of each figure (default: 5)")
    parser.add_argument("--json", type=Path, default=None, help="file to write all figures to")
    parser.add_argument("--child", type=Path, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(first_batch(args.child)))
        return
    figures = {"cpus": os.cpu_count(), "load_before": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.only:
            figures[name] = PARTS[name](Path(folder), args)
            print(f"{name:<8} {', '.join(f'{key} {value:.3g}' for key, value in figures[name].items())}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


def million(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    (folder / "features").mkdir(exist_ok=True)
    slides = [f"PIT_01_{i:05d}_01" for i in range(min(10_000, args.num_records))]
    write_case(folder / "features" / f"{slides[0]}.h5", 300, 16)
    for slide in slides[1:]:
        os.link(folder / "features" / f"{slides[0]}.h5", folder / "features" / f"{slide}.h5")
    with (folder / "records.json").open("w") as file:
        file.write("[")
        for i in range(args.num_records):
            report = REPORT.format(grade=i % 3 + 1, n=i % 977)
            row = {"id": f"{slides[i % len(slides)]}.tiff", "question": f"Question {i}?", "report": report}
            file.write(("," if i else "") + json.dumps(row))
        file.write("]")
    runs = []
    for _ in range(args.repeats):
        command = [sys.executable, __file__, "--child", str(folder)]
        began = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        runs.append((time.perf_counter() - began, *json.loads(done.stdout)))
    seconds, cpu_seconds, peaks = zip(*runs, strict=True)
    return {
        "seconds": statistics.median(seconds),
        "cpu_seconds": statistics.median(cpu_seconds),
        "peak_gb": max(peaks) / 2**30,
    }


def first_batch(folder: Path) -> tuple[float, int]:
    """Read the records as training does and make a batch, in a process of its own: its CPU seconds and peak bytes."""
    from slide_reports import Prompt, RecordBatches, ReportDataset, make_loader, read_training_records

    train, _, problems = read_training_records(
        str(folder / "records.json"), None, val_fraction=0.1, seed=0, features_dir=str(folder / "features")
    )
    assert not problems
    data = ReportDataset(train, bytes_tokenizer(), Prompt("", "{question}", ""), "?", num_patches=256, seed=0)
    batch = next(iter(make_loader(data, RecordBatches(len(data), 8, shuffle=True))))
    assert batch["patch_tokens"].shape == (8, 256, 16)
    return time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def rows(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    path = write_case(folder / "wide.h5", 20_000, 1536)
    rng = np.random.default_rng(0)
    ratios, seconds = [], []
    for _ in range(args.repeats):
        chosen = choose_patches(20_000, 256, rng)
        some = timed(lambda chosen=chosen: read_slide_features(path, rows=chosen))
        everything = timed(lambda chosen=chosen: read_slide_features(path).features[chosen])
        ratios.append(everything / some)
        seconds.append(some)
    return {"ratio": statistics.median(ratios), "milliseconds": 1000 * statistics.median(seconds)}


def loader(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    from slide_reports import Prompt, Record, ReportDataset, with_inputs

    (folder / "cases").mkdir(exist_ok=True)
    records = []
    for i in range(256):  # of 16 files, each under 16 names
        path = folder / "cases" / f"case_{i}.h5"
        write_case(path, 5_000, 1536) if i < 16 else os.link(folder / "cases" / f"case_{i % 16}.h5", path)
        records.append(Record(str(i), (path,), "", REPORT, str(i)))
    records, _ = with_inputs(records)  # as training does before it begins, so that the workers know every file
    data = ReportDataset(records * 4, bytes_tokenizer(), Prompt("", "{question}", ""), "?", num_patches=256, seed=0)
    with_model, without = zip(
        *((load_all(data, SECONDS_PER_SAMPLE), load_all(data, 0)) for _ in range(args.repeats)), strict=True
    )
    figures = {name: statistics.median(run[name] for run in with_model) for name in with_model[0]}
    return figures | {"without_model_per_s": statistics.median(run["samples_per_s"] for run in without)}


def load_all(data, seconds_per_sample: float) -> dict[str, float]:
    """One pass over the data from its second batch on."""
    import psutil

    from accelerator_setup import add_run_arguments
    from slide_reports import RecordBatches, make_loader

    parser = make_parser(None)
    add_run_arguments(parser)
    num_workers = parser.get_default("num_workers")
    batches = iter(make_loader(data, RecordBatches(len(data), 8, shuffle=True), num_workers=num_workers))
    workers = [psutil.Process(worker.pid) for worker in batches._workers]
    next(batches)
    cpu_before, own_before = cpu_seconds(workers), time.process_time()
    waited, began, samples = 0.0, time.perf_counter(), 0
    while samples < len(data) - 8:
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        samples += len(batch["labels"])
        time.sleep(seconds_per_sample * len(batch["labels"]))
    whole = time.perf_counter() - began
    return {
        "waiting_share": waited / whole,
        "samples_per_s": samples / whole,
        "worker_cpu_ms": 1000 * (cpu_seconds(workers) - cpu_before) / samples,
        "own_cpu_ms": 1000 * (time.process_time() - own_before) / samples,
    }


def timed(work) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def cpu_seconds(processes) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def write_case(path: Path, num_patches: int, width: int) -> Path:
    features = np.random.default_rng(0).normal(size=(num_patches, width)).astype(np.float16)
    coords = np.stack([np.arange(num_patches) % 100, np.arange(num_patches) // 100], axis=1) * 256
    write_slide_features(path, features, coords, name=path.stem, **FACTS)
    return path


def bytes_tokenizer():
    """A tokenizer of bytes: what a real one takes is not what is measured."""

    def tokenize(text: str, add_special_tokens: bool = False) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    return tokenize


PARTS = {"million": million, "rows": rows, "loader": loader}

if __name__ == "__main__":
    main()
