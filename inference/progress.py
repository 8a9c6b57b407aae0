"""The journal of a prediction: each answer once, whatever interrupts it, and never continued under other flags."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import TextIO

from command_line import flags_of
from inference.arguments import decoding_flags
from slide_features import atomic_path

# Flags that do not change the answers.
FREE = {"output", "batch_size", "overwrite", "device", "format", "details", "save_decoding", "num_workers", "threads"}
FREE |= {"tile_batch_size", "compile", "ple_device"}


def run_description(args, saved_decoding: dict, slides: list) -> dict:
    """What decides the answers; progress made under another description is not continued."""
    described = {name: value for name, value in flags_of(args).items() if name not in FREE}
    described |= decoding_flags(args, saved_decoding)
    given = (args.test_json, args.allowed_reports, args.grammar, args.snap_to)
    files = [Path(path) for path in given if path is not None and Path(path).is_file()]
    files += sorted(path for path in Path(args.model).rglob("*") if path.is_file())
    described["sha256"] = {str(path): hash_of(path) for path in files}
    for entry in slides:
        found = entry.path.stat()
        described.setdefault("slide_files", {})[str(entry.path)] = [found.st_size, found.st_mtime_ns]
    return described


def hash_of(path: Path) -> str:
    """SHA-256 of a file, also of one of many gigabytes, in constant memory; of vlm.json, but for its decoding."""
    if path.name == "vlm.json":
        values = {name: value for name, value in json.loads(path.read_text()).items() if name != "decoding"}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def run_file(output: Path) -> Path:
    """Beside finished predictions: what they were made with."""
    return output.with_name(output.name + ".run.json")


def refuse_foreign_file(output: Path, progress_dir: Path) -> None:
    """Raise ValueError if ``output`` is a file that no prediction wrote: the references, under another name."""
    if output.is_file() and not run_file(output).is_file() and not progress_dir.exists():
        raise ValueError(f"--output {output} exists and is not of predict.py; name another, or add --overwrite")


def answers_everything(output: Path, progress_dir: Path, description: dict) -> bool:
    """Whether ``output`` is the finished work of the same model, records and flags.

    Raises:
        ValueError: it is of others, finished or not.
    """
    kept = progress_dir / "settings.json"
    earlier = kept if kept.is_file() else run_file(output)
    if earlier.is_file() and json.loads(earlier.read_text()) != description:
        raise ValueError(f"--output {output} is of another model, records or flags; name another, or add --overwrite")
    return output.is_file() and run_file(output).is_file() and not progress_dir.exists()


def prepare_progress(progress_dir: Path, output: Path, description: dict, *, overwrite: bool) -> None:
    """Make the progress folder, or empty it; answers in it stay, failures are tried again."""
    if overwrite:
        shutil.rmtree(progress_dir, ignore_errors=True)
        run_file(output).unlink(missing_ok=True)
    progress_dir.mkdir(parents=True, exist_ok=True)
    for stale in progress_dir.glob("done_*.json"):
        stale.unlink()
    with atomic_path(progress_dir / "settings.json") as partial:
        partial.write_text(json.dumps(description, indent=1))


def open_journal(path: Path) -> TextIO:
    """Open a journal to add lines, a line cut short by a kill closed first, so that the next one stands alone."""
    is_cut = path.is_file() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    journal = path.open("a")
    if is_cut:
        journal.write("\n")
    return journal


def read_progress(progress_dir: Path) -> dict[int, dict]:
    """Answers by record index; a line cut short by a kill is left out."""
    answers = {}
    for journal in sorted(progress_dir.glob("process_*.jsonl")):
        for line in journal.read_text().splitlines():
            try:
                answer = json.loads(line)
            except json.JSONDecodeError:
                continue
            answers[answer["index"]] = answer
    return answers
