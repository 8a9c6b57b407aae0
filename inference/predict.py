r"""Write the reports of many slides (or answers about many images) from a file of records, or straight from slides.

  accelerate launch inference/predict.py --model runs/stage2/final_model --test_json test.json \
      --features_dir OUT/features --output predictions.json
  accelerate launch inference/predict.py --model runs/stage2/final_model --slides slides/ --output predictions.json

The same command goes on where an interrupted one stopped; a record that failed is tried again. Questions about one case
share what is read of it. With --slides the next slide is tiled and encoded while this one's report is decoded.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Collection
from pathlib import Path

from accelerate import PartialState
from jsonargparse.typing import PositiveInt
from tqdm import tqdm

from accelerator_setup import LONGEST_WAIT, runs_on_cpu
from command_line import DONE, SOME_FAILED, GatherValues, check_output_file, chosen, counted, make_parser, run
from inference.answers import Answering, unread_line
from inference.arguments import SAVED, add_decoding_arguments, check_decoding_arguments
from inference.case_batches import CaseBatch, batches_of, read_ahead, records_of_slides, records_to_answer
from inference.loading import dtype_name, model_folder, open_model
from inference.new_slides import SlideReader, add_slide_arguments, check_slide_arguments
from inference.progress import (
    answers_everything,
    open_journal,
    prepare_progress,
    read_progress,
    refuse_another_dtype,
    refuse_foreign_file,
    run_description,
    run_file,
)
from inference.submission import FORMATS, write_predictions
from slide_features import atomic_path
from slide_reports import check_input_kind
from vlm_settings import VLMSettings


def parse_arguments():
    parser = make_parser(__doc__)
    group = parser.add_argument_group("Model and records")
    group.add_argument("--model", required=True, help="final_model folder of stage 1 or 2, or a hub name")
    group.add_argument("--test_json", default=None, help="records to answer; reports in it are not read")
    group.add_argument("--features_dir", default=None, help="folder of stage 0's <slide_id>.h5, for slides")
    group.add_argument(
        "--slides",
        nargs="+",
        action=GatherValues,
        default=None,
        help="slides in place of features: folders, files, or CSVs as stage 0 takes them; all of them, or those that "
        "--test_json names",
    )
    group.add_argument("--image_root", default=None, help="folder that `image` in the records is relative to")
    group.add_argument("--question", default=None, help="asked where a record has none; default: the model's own")
    group.add_argument("--output", required=True, help="JSON file to write: [{id, report}]")
    group.add_argument(
        "--format",
        choices=FORMATS,
        default="list",
        help="of --output: a row a record; reg2025, a report an id; reg2026, a chain of questions an id",
    )
    group.add_argument(
        "--details", action="store_true", help="add question, beam score, probabilities, seconds, … to each record"
    )
    group.add_argument("--batch_size", type=PositiveInt, default=4, help="records decoded together, per process")
    group.add_argument("--overwrite", action="store_true", help="answer every record anew")
    group.add_argument(
        "--save_decoding",
        action="store_true",
        help="write num_beams, max_new_tokens and length_penalty into the model's vlm.json, for later inference",
    )
    add_slide_arguments(parser)
    add_decoding_arguments(parser)
    args = parser.parse_args()
    if not (args.test_json or args.slides):
        raise ValueError("give --test_json, or --slides, or both")
    if args.slides and (args.features_dir or args.image_root):
        raise ValueError("give --slides, or --features_dir or --image_root, not both")
    if args.details and args.format != "list":
        raise ValueError(f"--details goes with --format list, not {args.format}")
    return args


def main() -> int:
    args = parse_arguments()
    state = PartialState(cpu=args.device == "cpu" or runs_on_cpu(), timeout=LONGEST_WAIT)
    with state.local_main_process_first():
        args.model = model_folder(args.model)
    output = Path(args.output)
    check_output_file(output, **chosen(args, ("test_json", "allowed_reports", "grammar", "snap_to")))
    progress_dir = output.with_name(output.name + ".progress")

    # Records
    settings = VLMSettings.read(args.model)
    check_input_kind(args.model, settings, args.image_root)
    check_decoding_arguments(args)
    records, slides = find_records(args, settings)
    FORMATS[args.format].check(records)
    description = run_description(args, settings.decoding, list(slides.values()))
    if not args.overwrite:
        refuse_foreign_file(output, progress_dir)
    is_complete = not args.overwrite and answers_everything(output, progress_dir, description, records)
    state.wait_for_everyone()
    if is_complete:
        if state.is_main_process:
            print(f"{output}: {counted(len(records), 'record')}, answered before", file=sys.stderr)
        return DONE

    # Model
    answering = Answering.of(args, settings)
    model, tokenizer = open_model(args, args.device or state.device)
    model.settings.question = args.question or settings.question
    reader = SlideReader(args, model) if args.slides else None
    description["dtype"] = dtype_name(model)

    # Resume
    if not args.overwrite:
        refuse_another_dtype(progress_dir, description["dtype"], "fp32" if model.device.type == "cpu" else "bf16")
    if state.is_main_process:
        tell_unread_questions(records, model.settings, tokenizer)
        prepare_progress(progress_dir, output, description, overwrite=args.overwrite)
    state.wait_for_everyone()
    finished = read_progress(progress_dir)
    batches = batches_of(records, finished, args.batch_size)[state.process_index :: state.num_processes]

    # Answer
    done = {"failures": {}, "cases": 0, "records": 0, "tokens": 0, "seconds": 0.0}
    began = time.perf_counter()
    bar = tqdm(total=sum(map(len, batches)), unit="record", disable=not state.is_main_process)
    with open_journal(progress_dir / f"process_{state.process_index}.jsonl") as journal:
        for batch in read_ahead(batches, model, tokenizer, reader, slides):
            answers, failed = answer_batch(model, tokenizer, batch, answering, args.batch_size)
            journal.writelines(json.dumps(answer) + "\n" for answer in answers)
            journal.flush()
            done["failures"] |= failed
            done["cases"] += batch.num_cases
            done["records"] += len(answers)
            done["tokens"] += sum(answer["num_tokens"] for answer in answers)
            bar.update(len(batch))
            bar.set_postfix_str(throughput(done, time.perf_counter() - began))
    bar.close()
    done["seconds"] = time.perf_counter() - began
    with atomic_path(progress_dir / f"done_{state.process_index}.json") as partial:
        partial.write_text(json.dumps(done))
    state.wait_for_everyone()

    # Save
    parts = [json.loads(file.read_text()) for file in sorted(progress_dir.glob("done_*.json"))]
    failures = {index: error for part in parts for index, error in part["failures"].items()}
    state.wait_for_everyone()
    if state.is_main_process:
        answers = read_progress(progress_dir)
        write_predictions(output, records, answers, form=args.format, details=args.details)
        for index, error in failures.items():
            print(f"failed: {records[int(index)].id}: {error}", file=sys.stderr)
        tell_answers(answers.values(), bool(answering.uncertain))
        totals = {key: sum(part[key] for part in parts) for key in ("cases", "records", "tokens")}
        print(throughput(totals, max(part["seconds"] for part in parts)), file=sys.stderr)
        print(f"{len(answers)} of {counted(len(records), 'record')} answered: {output}", file=sys.stderr)
        if args.save_decoding:
            save_decoding(Path(args.model), answering)
        if not failures:
            os.replace(progress_dir / "settings.json", run_file(output))
            shutil.rmtree(progress_dir)
    return SOME_FAILED if failures else DONE


def find_records(args, settings: VLMSettings):
    """The records that the flags name, and the slides by path where they are read themselves."""
    if not args.slides:
        return records_to_answer(args.test_json, args.features_dir, args.image_root), {}
    check_slide_arguments(args, settings)
    return records_of_slides(args.slides, args.test_json)


def answer_batch(
    model, tokenizer, batch: CaseBatch, answering: Answering, rows_at_once: int
) -> tuple[list[dict], dict[int, str]]:
    """Answers to the records of a batch, and an error for each that has none."""
    began = time.perf_counter()
    numbers = list(batch.samples)
    described = answering.answer_or_say_why(model, tokenizer, list(batch.samples.values()), numbers, rows_at_once)
    seconds = round((time.perf_counter() - began) / max(1, len(numbers)), 3)
    answers, failed = [], dict(batch.failed)
    for index, answer in zip(numbers, described, strict=True):
        if isinstance(answer, str):
            failed[index] = answer
            continue
        record = batch.records[index]
        question = record.question or model.settings.question
        answers.append({"index": index, "id": record.id, "question": question, **answer, "seconds": seconds})
    return answers, failed


def tell_unread_questions(records, settings: VLMSettings, tokenizer) -> None:
    """Say how many records ask what the model does not read to its end."""
    lines = {
        question: unread_line(settings, tokenizer, question)
        for question in {record.question or settings.question for record in records}
    }
    if cut := sum(bool(lines[record.question or settings.question]) for record in records):
        longest = settings.max_question_tokens
        print(f"{cut} of {len(records)} questions are cut: the model reads {longest} tokens of one", file=sys.stderr)


def tell_answers(answers: Collection[dict], tells_uncertain: bool) -> None:
    """Say how many answers are to be read by somebody, and how many lack their end."""
    told = counted(len(answers), "record")
    if tells_uncertain:
        uncertain = sum(answer["uncertain"] for answer in answers)
        print(f"uncertain: {uncertain} of {told}, to be read by somebody", file=sys.stderr)
    if cut := sum(answer.get("cut_off", False) for answer in answers):
        print(f"cut off: {cut} of {told}, before their end; see --max_new_tokens", file=sys.stderr)


def throughput(done: dict, seconds: float) -> str:
    """How fast it goes: cases, of slides or images, and tokens of answers a second."""
    seconds = max(seconds, 1e-9)
    return f"{done['cases'] / seconds:.2f} cases/s, {done['tokens'] / seconds:.1f} tokens/s"


def save_decoding(folder: Path, answering: Answering) -> None:
    """Write how answers were searched into the model's settings."""
    settings = VLMSettings.read(folder)
    settings.decoding |= {name: getattr(answering.decoding, name) for name in SAVED}
    settings.write(folder)


if __name__ == "__main__":
    run(main)
