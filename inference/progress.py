"""The journal of a prediction: each answer once, whatever interrupts it, and never continued under other flags."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from command_line import flags_of
from inference.arguments import decoding_flags
from slide_features import atomic_path
from slide_reports import Record

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


def answers_everything(output: Path, progress_dir: Path, description: dict, records: Sequence[Record]) -> bool:
    """Whether ``output`` is the finished work of the same model, records and flags.

    Raises:
        ValueError: it is of others, finished or not.
    """
    kept = progress_dir / "settings.json"
    earlier = kept if kept.is_file() else run_file(output)
    if earlier.is_file():
        had = json.loads(earlier.read_text())
        if description.get("dtype") is None:  # known when the model is loaded, see `refuse_another_dtype`
            had["dtype"] = None
        if earlier is kept and had.get("slide_files", {}).keys() == description.get("slide_files", {}).keys():
            # A slide that has no answer yet may have been mended.
            numbers = [number for number in read_progress(progress_dir) if number < len(records)]
            answered = {str(path) for number in numbers for path in records[number].inputs}
            had |= {"slide_files": description.get("slide_files", {}) | _only(had.get("slide_files", {}), answered)}
        if others := differences(had, description):
            more = f" and {len(others) - 3} more" if len(others) > 3 else ""
            raise ValueError(
                f"--output {output} is of other work ({', '.join(others[:3])}{more}); name another, or add --overwrite"
            )
    return output.is_file() and run_file(output).is_file() and not progress_dir.exists()


def refuse_another_dtype(progress_dir: Path, dtype: str, default: str) -> None:
    """Refuse to go on in another dtype than that of the answers so far: defaults depend on the machine.

    Args:
        progress_dir: of the run.
        dtype: that the language model has now.
        default: that an earlier version, which did not note it, had here.

    Raises:
        ValueError: names both.
    """
    kept = progress_dir / "settings.json"
    had = (json.loads(kept.read_text()).get("dtype") or default) if kept.is_file() else dtype
    if had != dtype:
        raise ValueError(
            f"{progress_dir}: its answers are of a language model in {had}, not {dtype}; go on with --dtype {had}, or "
            "add --overwrite"
        )


def _only(files: dict, paths: set[str]) -> dict:
    return {path: value for path, value in files.items() if path in paths}


def differences(had: dict, description: dict) -> list[str]:
    """What of two descriptions is not the same, in words."""
    found = []
    for name in sorted(had.keys() | description.keys()):
        before, now = had.get(name), description.get(name)
        if name in ("sha256", "slide_files"):
            before, now = before or {}, now or {}
            for path in sorted(path for path in before.keys() | now.keys() if before.get(path) != now.get(path)):
                how = "is new" if path not in before else "has changed" if path in now else "is not among them now"
                found.append(f"{path} {how}")
        elif before != now:
            found.append(f"--{name} was {json.dumps(before)}")
    return found


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
