r"""What a training step costs against the usual way, as ratios measured in one run on one machine.

    OMP_NUM_THREADS=2 python benchmarks/train_step.py --json train_step.json
    python benchmarks/train_step.py --only padding batches
    python benchmarks/train_step.py --only gpu

A Gemma-3n of random weights in float32 with the published vocabulary of 262,400, 8 layers of width 256, two of which
share keys and values; REG 2025 reports in a byte-pair vocabulary of 1,024 made from them (made-up ones of as many words
where the file is absent), behind 256 visual tokens.

    step     stage 1, one step of the usual way / one of ours; higher is better. The usual way is the stock forward with
             labels, hence logits of every position, each sample padded to the longest of the data set. Ours is
             `SlideVLM` on batches of like length. Both do forward, backward and AdamW on the projector.
    memory   peak of resident memory in one such step less that before it, the model being loaded: the usual way / ours.
             Each in a process of its own; Linux only.
    padding  share of tokens that is padding, in an epoch: batches at random, of like length, packed.
    batches  four questions about each case; samples/s of batches of like length, and packed, / those of batches at
             random, all three with our loss and padded to the longest of the batch. Higher is better.
    ple      --ple_device cpu / model: seconds of forward and backward, and memory that the model takes, loaded from a
             checkpoint in bfloat16, each in a process of its own.
    gpu      E2B-shaped, in bfloat16: see train_step_gpu.py. Says why when it cannot run.

The usual way needs about 1.7 GB a sample of memory; --batch_size 1 fits small machines. The order of a repetition's
measurements is fixed, and each ratio is the median of those of the repetitions.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import Gemma3nForCausalLM

from benchmarks.training_batches import Asked, ask, cpu_config, make_batch, make_model, read_reports
from language_model import load_llm
from packing import PADDING
from slide_reports import RecordBatches
from slide_vlm import IGNORED_LABEL, IMAGE_MARKER, SlideVLM

PATCH_WIDTH = 1536
WAYS = ("usual", "ours")
ORDERS = ("random", "like length", "packed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to measure (default: all)")
    parser.add_argument("--batch_size", type=int, default=8, help="samples of a step (default: 8)")
    parser.add_argument("--num_visual_tokens", type=int, default=256, help="of a case (default: 256)")
    parser.add_argument("--vocab_size", type=int, default=262_400, help="of the language model (default: 262400)")
    parser.add_argument("--num_reports", type=int, default=1600, help="records of an epoch, about (default: 1600)")
    parser.add_argument("--steps", type=int, default=8, help="batches: steps of each order (default: 8)")
    parser.add_argument("--repeats", type=int, default=3, help="step: repetitions, after one to warm up (default: 3)")
    parser.add_argument("--gpu_batch_size", type=int, default=16, help="gpu: samples of a step (default: 16)")
    parser.add_argument("--json", type=Path, default=None, help="file to write all figures to")
    parser.add_argument("--child", nargs=2, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(CHILDREN[args.child[0]](args, args.child[1]))
        return
    about = {name: value for name, value in vars(args).items() if name not in ("json", "child", "only")}
    figures = about | {"cpus": os.cpu_count(), "threads": torch.get_num_threads(), "load_before": os.getloadavg()[0]}
    print(f"{figures['threads']} threads, {figures['cpus']} CPUs, load {figures['load_before']:.1f}")
    for name in args.only:
        figures[name], line = PARTS[name](args)
        print(f"{name:8} {line}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


# What is compared


class Steps:
    """Optimizer steps of stage 1 on records, the usual way or ours."""

    def __init__(self, args: argparse.Namespace, records: Sequence[Asked], tokenizer, seed: int = 0):
        torch.manual_seed(seed)
        llm = Gemma3nForCausalLM(cpu_config(args.vocab_size)).eval()
        self.visual = args.num_visual_tokens
        self.model: SlideVLM = make_model(llm, tokenizer, self.visual, PATCH_WIDTH).train()
        self.longest = max(record.length(self.visual) for record in records)
        self.optimizer = torch.optim.AdamW(self.model.projector.parameters(), lr=1e-5)

    def take(self, way: str, records: Sequence[Asked], *, packed: bool = False) -> float:
        """One step; its loss."""
        loss = self.loss(way, records, packed=packed)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def loss(self, way: str, records: Sequence[Asked], *, packed: bool = False) -> torch.Tensor:
        """Mean negative log-likelihood per supervised token."""
        batch = make_batch(records, self.visual, PATCH_WIDTH, packed=packed)
        return self.usual_loss(batch) if way == "usual" else self.model(batch).mean()

    def usual_loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Loss of the stock forward, its input padded to the longest of all records."""
        inputs = self.model.embed(batch)
        more = self.longest - inputs["input_ids"].shape[1]
        padded = {
            "inputs_embeds": torch.nn.functional.pad(inputs["conditioning"]["inputs_embeds"], (0, 0, 0, more)),
            "per_layer_inputs": torch.nn.functional.pad(
                inputs["conditioning"]["per_layer_inputs"], (0, 0, 0, 0, 0, more)
            ),
            "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, more)),
            "labels": torch.nn.functional.pad(inputs["labels"], (0, more), value=IGNORED_LABEL),
        }
        return self.model.llm(**padded, use_cache=False).loss


def epoch(records: Sequence[Asked], order: str, args: argparse.Namespace, batch_size: int) -> list[list[Asked]]:
    """The steps of a shuffled epoch."""
    alike = {}
    if order == "like length":
        alike["lengths"] = [record.length(args.num_visual_tokens) for record in records]
    if order == "packed":
        alike["cases"] = [record.case for record in records]
    batches = RecordBatches(len(records), batch_size, shuffle=True, **alike)
    return [[records[key.index] for key in batch] for batch in batches]


def supervised(records: Sequence[Asked]) -> int:
    return sum(label != IGNORED_LABEL for record in records for label in record.labels)


# Parts


def step(args: argparse.Namespace) -> tuple[dict, str]:
    reports, source = read_reports(args.num_reports)
    records, tokenizer = ask(reports, mixed=False)
    steps = Steps(args, records, tokenizer)
    batches = epoch(records, "like length", args, args.batch_size)
    same = batches[0]
    with torch.no_grad():
        losses = [float(steps.loss(way, same)) for way in WAYS]
    assert abs(losses[0] - losses[1]) < 1e-4 * losses[0], losses
    seconds = {way: [] for way in WAYS}
    for repetition in range(-1, args.repeats):
        for way in WAYS:
            found, _ = timed(lambda way=way, at=repetition: steps.take(way, batches[at + 1]))
            seconds[way] += [found] * (repetition >= 0)
    ratios = [usual / ours for usual, ours in zip(seconds["usual"], seconds["ours"], strict=True)]
    tokens = supervised([record for batch in batches[1 : args.repeats + 1] for record in batch])
    speed = {way: tokens / sum(seconds[way]) for way in WAYS}
    padded = 1 - sum(record.length(args.num_visual_tokens) for record in records) / (len(records) * steps.longest)
    found = {"ratio": statistics.median(ratios), "ratios": ratios, "seconds": seconds, "reports": source}
    found |= {"supervised_tokens_per_s": speed, "usual_padding": padded}
    line = (
        f"usual {statistics.median(seconds['usual']):.2f} s, ours {statistics.median(seconds['ours']):.2f} s: "
        f"{found['ratio']:.1f} x; supervised tokens/s {speed['usual']:.0f} and {speed['ours']:.0f}; "
        f"{padded:.1%} of the usual way is padding ({source})"
    )
    return found, line


def memory(args: argparse.Namespace) -> tuple[dict, str]:
    if not sys.platform.startswith("linux"):
        return {}, "skipped: reads /proc"
    peaks = {way: int(in_a_process(args, "memory", way)) for way in WAYS}
    ratio = peaks["usual"] / peaks["ours"]
    each = ", ".join(f"{way} {peak / 2**20:.0f} MiB" for way, peak in peaks.items())
    return {"ratio": ratio, "peak_bytes": peaks}, f"{each}: {ratio:.1f} x"


def memory_of_step(args: argparse.Namespace, way: str) -> int:
    """Peak of resident memory in the longest step of an epoch, less that of the loaded model."""
    reports, _ = read_reports(args.num_reports)
    records, tokenizer = ask(reports, mixed=False)
    steps = Steps(args, records, tokenizer)
    batches = epoch(records, "like length", args, args.batch_size)
    longest = max(batches, key=lambda batch: max(record.length(0) for record in batch))
    steps.model(make_batch(records[:1], 1, PATCH_WIDTH)).sum().backward()  # libraries are loaded, gradients exist
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    steps.take(way, longest)
    return resident("VmHWM") - before


def padding(args: argparse.Namespace) -> tuple[dict, str]:
    reports, _ = read_reports(args.num_reports)
    found = {}
    for questions in ("reports", "mixed"):
        records, _ = ask(reports if questions == "reports" else reports[: args.num_reports // 4], mixed=True)
        records = [record for i, record in enumerate(records) if questions == "mixed" or i % 4 == 0]
        for order in ORDERS:
            found[f"{questions}, {order}"] = padded_share(epoch(records, order, args, args.batch_size), args, order)
    return found, ", ".join(f"{name} {share:.2%}" for name, share in found.items())


def padded_share(batches: Sequence[Sequence[Asked]], args: argparse.Namespace, order: str) -> float:
    from packing import pack

    tokens = slots = 0
    for batch in batches:
        lengths = [record.length(args.num_visual_tokens) for record in batch]
        if order != "packed":
            tokens, slots = tokens + sum(lengths), slots + max(lengths) * len(batch)
            continue
        shared = [record.input_ids.index(IMAGE_MARKER) + args.num_visual_tokens for record in batch]
        ids = torch.zeros(len(batch), max(lengths), dtype=torch.long)
        rows = pack(ids, lengths, shared, [record.case for record in batch])
        tokens, slots = tokens + int((rows.source_RC != PADDING).sum()), slots + rows.source_RC.numel()
    return 1 - tokens / slots


def batches(args: argparse.Namespace) -> tuple[dict, str]:
    reports, source = read_reports(args.num_reports // 4)
    records, tokenizer = ask(reports, mixed=True)
    steps = Steps(args, records, tokenizer)
    runs = {order: epoch(records, order, args, args.batch_size) for order in ORDERS}
    seconds = {order: 0.0 for order in ORDERS}
    for at in range(-1, args.steps):
        for order in ORDERS:
            found, _ = timed(lambda order=order, at=at: steps.take("ours", runs[order][at], packed=order == "packed"))
            seconds[order] += found if at >= 0 else 0
    speed = {order: args.steps * args.batch_size / seconds[order] for order in ORDERS}
    ratios = {order: speed[order] / speed["random"] for order in ORDERS}
    lengths = [record.length(0) for record in records]
    each = ", ".join(f"{order} {speed[order]:.2f} samples/s ({ratios[order]:.2f} x)" for order in ORDERS)
    spread = np.percentile(lengths, [5, 50, 95]).tolist()
    found = {"ratios": ratios, "samples_per_s": speed, "text_tokens_at_5_50_95_percent": spread, "reports": source}
    return found, f"{each}; text of {spread[0]:.0f} to {spread[2]:.0f} tokens"


def ple(args: argparse.Namespace) -> tuple[dict, str]:
    if not sys.platform.startswith("linux"):
        return {}, "skipped: reads /proc"
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        Gemma3nForCausalLM(cpu_config(args.vocab_size)).to(torch.bfloat16).save_pretrained(folder)
        made = {place: json.loads(in_a_process(args, "ple", f"{place}:{folder}")) for place in ("model", "cpu")}
    ratio = made["cpu"]["seconds"] / made["model"]["seconds"]
    saved = made["model"]["anonymous_bytes"] - made["cpu"]["anonymous_bytes"]
    config = cpu_config(args.vocab_size)
    table = 4 * config.vocab_size_per_layer_input * config.num_hidden_layers * config.hidden_size_per_layer_input
    line = (
        f"{ratio:.2f} x the time of a step; {saved / 2**20:.0f} MiB less memory, the table is {table / 2**20:.0f} MiB"
    )
    return {"ratio": ratio, "saved_bytes": saved, "table_bytes": table} | made, line


def cost_of_table(args: argparse.Namespace, place_and_folder: str) -> str:
    """Seconds of a forward and backward pass, and memory of the loaded model that is not of mapped files."""
    place, folder = place_and_folder.split(":", 1)
    records, tokenizer = ask(read_reports(64)[0], mixed=False)
    before = resident("RssAnon")
    llm = load_llm(folder, ple_device=place)
    model = make_model(llm, tokenizer, args.num_visual_tokens, PATCH_WIDTH).train()
    taken = resident("RssAnon") - before
    batch = make_batch(records[: args.batch_size], args.num_visual_tokens, PATCH_WIDTH)
    seconds = [timed(lambda: model(batch).sum().backward())[0] for _ in range(args.repeats + 1)][1:]
    return json.dumps({"seconds": statistics.median(seconds), "anonymous_bytes": taken})


def gpu(args: argparse.Namespace) -> tuple[dict, str]:
    if not torch.cuda.is_available():
        return {}, "skipped: no CUDA device"
    from benchmarks.train_step_gpu import measure_gpu

    return measure_gpu(args.gpu_batch_size, args.num_visual_tokens, args.repeats)


PARTS = {"step": step, "memory": memory, "padding": padding, "batches": batches, "ple": ple, "gpu": gpu}
CHILDREN = {"memory": memory_of_step, "ple": cost_of_table}


# Measuring


def timed(work: Callable[[], object]) -> tuple[float, object]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def resident(name: str) -> int:
    """A line of /proc/self/status in bytes: VmRSS, its peak VmHWM, RssAnon without mapped files."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def in_a_process(args: argparse.Namespace, what: str, which: str) -> str:
    names = ("batch_size", "num_visual_tokens", "vocab_size", "num_reports", "repeats")
    flags = [word for name in names for word in (f"--{name}", str(getattr(args, name)))]
    words = [sys.executable, str(Path(__file__).resolve()), "--child", what, which, *flags]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(
            f"{what} {which} left with {done.returncode}, for want of memory if -9:\n{done.stderr[-2000:]}"
        )
    return done.stdout.strip().splitlines()[-1]


if __name__ == "__main__":
    main()
