r"""Write the report of one slide (or answer questions about one image); the report alone goes to stdout.

  python inference/generate.py --model runs/stage2/final_model --slide X.svs
  python inference/generate.py --model runs/stage2/final_model --features OUT/features/X.h5 --question "Which grade?"
  python inference/generate.py --model runs/stage2/final_model --image X.png
  python inference/generate.py --model runs/stage2/final_model --slide X.svs --chat

A slide is tiled and encoded as the slides were that the model was trained on. Several slides or images are one
case, in the order given. Several questions share what is read of the case, and --chat goes on asking from the keyboard.
"""

import json
import sys
import time
from pathlib import Path

from command_line import DONE, GatherValues, check_output_folder, make_parser, run
from inference.arguments import add_decoding_arguments, check_decoding_arguments
from inference.new_slides import SlideReader, add_slide_arguments, check_slide_arguments


def parse_arguments():
    parser = make_parser(__doc__)
    group = parser.add_argument_group("What to report on")
    group.add_argument("--model", required=True, help="final_model folder of stage 1 or 2, or a hub name")
    group.add_argument(
        "--slide", nargs="+", action=GatherValues, default=None, help="whole-slide image, or several of one case"
    )
    group.add_argument(
        "--features", nargs="+", action=GatherValues, default=None, help="feature files of stage 0, instead of slides"
    )
    group.add_argument(
        "--image",
        nargs="+",
        action=GatherValues,
        default=None,
        help="image or images of one case, for a model of images",
    )
    group.add_argument(
        "--question",
        nargs="+",
        action=GatherValues,
        default=None,
        help="one or several, also as a flag each; default: the one that the model was trained with",
    )
    group.add_argument(
        "--chat", action="store_true", help="ask on from the keyboard, each question with what was said before"
    )
    group.add_argument("--evidence", default=None, help="folder to write which tiles each line of the report rests on")
    group.add_argument(
        "--json", action="store_true", help="print a JSON object with question, scores, probabilities of tokens, …"
    )
    add_slide_arguments(parser)
    add_decoding_arguments(parser)
    args = parser.parse_args()
    if sum(value is not None for value in (args.slide, args.features, args.image)) != 1:
        raise ValueError("give exactly one of --slide, --features and --image")
    if args.chat and (args.json or args.num_return > 1 or args.snap_to):
        raise ValueError("--chat shows one answer as it is written; leave out --json, --num_return and --snap_to")
    return args


def main() -> int:
    args = parse_arguments()
    if args.evidence is not None:
        check_output_folder(args.evidence, "--evidence")

    from inference.answers import Answering
    from inference.loading import model_folder, open_model
    from inference.memory import READING, decoding_mend, memory_told
    from vlm_settings import VLMSettings

    began = time.perf_counter()
    args.model = model_folder(args.model)
    settings = VLMSettings.read(args.model)
    check_input(args, settings)
    check_decoding_arguments(args)
    answering = Answering.of(args, settings)
    model, tokenizer = open_model(args)
    questions = args.question or ([] if args.chat else [settings.question])
    with memory_told(READING):
        case = read_case_of(args, model)
    with memory_told(decoding_mend(answering.decoding.num_beams)):
        if args.chat:
            from inference.chat import chat

            return chat(model, tokenizer, case, len(paths_of(args)), answering, first=questions)
        answer_questions(args, model, tokenizer, answering, questions, case, began)
    return DONE


def paths_of(args) -> list[str]:
    """Files of the case."""
    return args.slide or args.features or args.image


def answer_questions(args, model, tokenizer, answering, questions: list[str], case: dict, began: float) -> None:
    """Print the answer to each question about a case, and write what it rests on."""
    from inference.answers import make_sample, unread_line
    from inference.decoding import decode_samples

    paths = paths_of(args)
    for question in questions:
        for line in unread_line(model.settings, tokenizer, question):
            print(line, file=sys.stderr)
    samples = [make_sample(model, tokenizer, question, case, len(paths)) for question in questions]
    found = decode_samples(model, tokenizer, samples, decoding=answering.decoding, constraint=answering.constraint)
    for number, (question, answers) in enumerate(zip(questions, found, strict=True)):
        details = {
            "id": ", ".join(Path(path).name for path in paths),
            "question": question,
            **answering.describe(tokenizer, answers),
            "num_patches": sum(map(len, case.get("coords", []))) or None,
            "seconds": round(time.perf_counter() - began, 3),
        }
        if args.json:
            show_json(details, tokenizer, answers[0])
        else:
            show_text(details, question if len(questions) > 1 else None, is_first=number == 0)
            for line in answering.remarks(details):
                print(line, file=sys.stderr)
        sys.stdout.flush()
        if args.evidence:  # last, since it takes longest and may be refused
            folder = Path(args.evidence) / f"question_{number + 1}" if len(questions) > 1 else Path(args.evidence)
            write_case_evidence(args, model, tokenizer, samples[number], details, folder)


def show_json(details: dict, tokenizer, answer) -> None:
    """One JSON object a question, with the probability of each token."""
    from inference.answers import token_probabilities

    tokens = [[text, round(probability, 4)] for text, probability in token_probabilities(tokenizer, answer)]
    print(json.dumps(details | {"tokens": tokens}, indent=1))


def show_text(details: dict, question: str | None, *, is_first: bool) -> None:
    """Answers, under their questions where there are several."""
    if question is not None:
        print(f"{'' if is_first else chr(10)}# {question}")
    for number, answer in enumerate(details.get("n_best", [details])):
        if number:
            print()
        print(answer["report"])


def check_input(args, settings) -> None:
    """Refuse an input that does not exist or is not of the kind that the model takes, before anything is loaded."""
    for path in paths_of(args):
        if Path(path).is_dir() and args.slide:
            raise IsADirectoryError(f"{path}: a folder; name slides of one case, or give it to predict.py as --slides")
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such file")
    if args.evidence and (args.image or args.chat):
        raise ValueError("--evidence shows what written reports of slides rest on; leave out --image and --chat")
    if args.evidence:
        from inference.evidence_files import check_evidence_folder
        from inference.slide_tokens import check_has_tiles

        check_has_tiles(settings, args.model)
        if len(args.question or ()) < 2:
            check_evidence_folder(Path(args.evidence))
    if settings.input_kind == "images" and not args.image:
        raise ValueError(f"{args.model} was trained on images; give --image")
    if settings.input_kind == "features" and args.image:
        raise ValueError(f"{args.model} was trained on slides; give --slide or --features")
    if args.slide:
        check_slide_arguments(args, settings)


def write_case_evidence(args, model, tokenizer, sample: dict, details: dict, folder: Path) -> None:
    """Find what the best answer to a question rests on and write it to a folder."""
    from inference.evidence import explain
    from inference.evidence_files import tiled_slide, tiled_slide_of_features, write_evidence

    if not details["report"]:
        print("--evidence: the report is empty, and rests on nothing", file=sys.stderr)
        return
    tiling = model.settings.tiling | {k: getattr(args, k) for k in ("tile_size", "mpp") if getattr(args, k) is not None}
    slides = [tiled_slide(path, tiling, args.assume_mpp) for path in args.slide or ()]
    slides += [tiled_slide_of_features(path) for path in args.features or ()]
    evidence = explain(model, tokenizer, sample, details["report"])
    write_evidence(folder, evidence, slides, {"model": str(args.model), "question": details["question"]})


def read_case_of(args, model) -> dict:
    """Patch tokens with coordinates, or pixels, of what the flags name."""
    from inference.answers import read_inputs

    if args.slide:
        return SlideReader(args, model).read(args.slide)
    return read_inputs(model, [Path(path) for path in args.features or args.image])


if __name__ == "__main__":
    run(main, to_go_on="run it again")
