r"""Write the reports of many slides (or answers about many images) from a file of records.

  accelerate launch inference/predict.py --model runs/stage2/final_model --test_json test.json \
      --features_dir OUT/features --output predictions.json

The same command goes on where an interrupted one stopped; a record that failed is tried again.
"""

import hashlib
import json
import os
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from accelerate import PartialState
from jsonargparse.typing import PositiveInt
from tqdm import tqdm

from accelerator_setup import LONGEST_WAIT, runs_on_cpu
from command_line import DONE, SOME_FAILED, flags_of, make_parser, run
from inference.arguments import add_decoding_arguments
from inference.decoding import answer_samples, open_model
from slide_features import atomic_path
from slide_reports import Record, ReportDataset, SampleKey, check_input_kind, read_records
from slide_vlm import SlideVLM, VLMSettings


def parse_arguments():
    parser = make_parser(__doc__)
    group = parser.add_argument_group("Model and records")
    group.add_argument("--model", required=True, help="final_model folder of stage 1 or 2")
    group.add_argument("--test_json", required=True, help="records to answer; reports in it are not read")
    group.add_argument("--features_dir", default=None, help="folder of stage 0's <slide_id>.h5, for slides")
    group.add_argument("--image_root", default=None, help="folder that `image` in the records is relative to")
    group.add_argument("--output", required=True, help="JSON file to write: [{id, report}]")
    group.add_argument("--details", action="store_true", help="add question, beam score and seconds to each record")
    group.add_argument("--batch_size", type=PositiveInt, default=4, help="records decoded together, per process")
    group.add_argument("--overwrite", action="store_true", help="answer every record anew")
    add_decoding_arguments(parser)
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    state = PartialState(cpu=args.device == "cpu" or runs_on_cpu(), timeout=LONGEST_WAIT)
    output = Path(args.output)
    progress_dir = output.with_name(output.name + ".progress")

    # Records
    check_input_kind(args.model, VLMSettings.read(args.model), args.image_root)
    records = read_records(args.test_json, features_dir=args.features_dir, image_root=args.image_root)
    if any(record.split == "test" for record in records):
        records = [record for record in records if record.split == "test"]
    description = run_description(args)
    is_complete = not args.overwrite and answers_everything(output, progress_dir, description)
    state.wait_for_everyone()
    if is_complete:
        if state.is_main_process:
            print(f"{output}: all {len(records)} records were answered before", file=sys.stderr)
        return DONE

    # Model
    model, tokenizer = open_model(args, args.device or state.device)

    # Resume
    if state.is_main_process:
        prepare_progress(progress_dir, output, description, overwrite=args.overwrite)
    state.wait_for_everyone()
    finished = read_progress(progress_dir)
    to_do = [(i, r) for i, r in enumerate(records) if i not in finished][state.process_index :: state.num_processes]

    # Answer
    decoding = {key: getattr(args, key) for key in ("num_beams", "max_new_tokens", "length_penalty")}
    failures = {}
    bar = tqdm(total=len(to_do), unit="record", disable=not state.is_main_process)
    with open_journal(progress_dir / f"process_{state.process_index}.jsonl") as journal:
        for start in range(0, len(to_do), args.batch_size):
            batch = to_do[start : start + args.batch_size]
            answers, failed = answer_batch(model, tokenizer, batch, decoding)
            journal.writelines(json.dumps(answer) + "\n" for answer in answers)
            journal.flush()
            failures |= failed
            bar.update(len(batch))
    bar.close()
    (progress_dir / f"failed_{state.process_index}.json").write_text(json.dumps(failures))
    state.wait_for_everyone()

    # Save
    failures = {}
    for file in sorted(progress_dir.glob("failed_*.json")):
        failures |= json.loads(file.read_text())
    state.wait_for_everyone()
    if state.is_main_process:
        answers = read_progress(progress_dir)
        write_predictions(output, records, answers, details=args.details)
        for index, error in failures.items():
            print(f"failed: {records[int(index)].id}: {error}", file=sys.stderr)
        print(f"{len(answers)} of {len(records)} records answered: {output}", file=sys.stderr)
        if not failures:
            os.replace(progress_dir / "settings.json", run_file(output))
            shutil.rmtree(progress_dir)
    return SOME_FAILED if failures else DONE


def answer_batch(
    model: SlideVLM, tokenizer: Any, batch: list[tuple[int, Record]], decoding: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """Answers to numbered records, and an error for each number whose record could not be read."""
    asked = [replace(record, answer="", later_turns=()) for _, record in batch]
    dataset = ReportDataset.for_model(model, tokenizer, asked)
    samples, failed = {}, {}
    for position, (index, _) in enumerate(batch):
        try:
            samples[position] = dataset[SampleKey(position, 0, False)]
        except (ValueError, OSError) as error:
            failed[index] = str(error)
    if not samples:
        return [], failed
    began = time.perf_counter()
    texts = answer_samples(model, tokenizer, list(samples.values()), **decoding)
    seconds = round((time.perf_counter() - began) / len(samples), 3)
    answers = []
    for position, (text, score) in zip(samples, texts, strict=True):
        index, record = batch[position]
        question = record.question or model.settings.question
        answer = {"index": index, "id": record.id, "report": text, "question": question}
        answers.append(answer | {"beam_score": score, "seconds": seconds})
    return answers, failed


def run_description(args) -> dict:
    """What decides the answers; progress made under another description is not continued."""
    free = {"output", "batch_size", "overwrite", "device", "ple_device"}
    described = {name: value for name, value in flags_of(args).items() if name not in free}
    files = [Path(args.test_json), *sorted(path for path in Path(args.model).rglob("*") if path.is_file())]
    return described | {"sha256": {str(path): hash_of(path) for path in files}}


def hash_of(path: Path) -> str:
    """SHA-256 of a file, also of one of many gigabytes, in constant memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def run_file(output: Path) -> Path:
    """Beside finished predictions: what they were made with."""
    return output.with_name(output.name + ".run.json")


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
    for stale in progress_dir.glob("failed_*.json"):
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


def write_predictions(output: Path, records: list[Record], answers: dict[int, dict], *, details: bool) -> None:
    """Write ``[{"id", "report"}]`` in the order of the records."""
    keys = ("id", "report", *(("question", "beam_score", "seconds") if details else ()))
    rows = [{key: answers[i][key] for key in keys} for i in range(len(records)) if i in answers]
    with atomic_path(output) as partial:
        partial.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
