r"""Write the report of one slide (or answer a question about one image); the report alone goes to stdout.

  python inference/generate.py --model runs/stage2/final_model --slide X.svs
  python inference/generate.py --model runs/stage2/final_model --features OUT/features/X.h5 --question "Which grade?"
  python inference/generate.py --model runs/stage2/final_model --image X.png

A slide is tiled and encoded as the slides were that the model was trained on. Several slides or images are one
case, in the order given.
"""

import json
import math
import sys
import time
from pathlib import Path

from jsonargparse.typing import PositiveFloat, PositiveInt

from command_line import DONE, make_parser, run
from inference.arguments import add_decoding_arguments


def parse_arguments():
    parser = make_parser(__doc__)
    group = parser.add_argument_group("What to report on")
    group.add_argument("--model", required=True, help="final_model folder of stage 1 or 2")
    group.add_argument("--slide", nargs="+", default=None, help="whole-slide image, or several of one case")
    group.add_argument("--features", nargs="+", default=None, help="feature files of stage 0, instead of slides")
    group.add_argument("--image", nargs="+", default=None, help="image or images of one case, for a model of images")
    group.add_argument("--question", default=None, help="default: the question that the model was trained with")
    group.add_argument(
        "--assume_mpp", type=float, default=None, help="um/px of a slide that states none or a wrong one"
    )
    group.add_argument("--tile_size", type=PositiveInt, default=None, help="pixels; default: as in training")
    group.add_argument("--mpp", type=PositiveFloat, default=None, help="um/px of tiles; default: as in training")
    group.add_argument(
        "--segmenter", default=None, help="network that found the tissue of the model's slides, where one did; its file"
    )
    group.add_argument("--segmenter_preset", choices=("grandqc-tissue", "hest"), default=None, help="as for tile.py")
    group.add_argument("--tile_batch_size", type=PositiveInt, default=64, help="tiles per forward pass of the encoder")
    group.add_argument("--num_workers", type=PositiveInt, default=4, help="threads that read tiles")
    group.add_argument("--evidence", default=None, help="folder to write which tiles each line of the report rests on")
    group.add_argument("--json", action="store_true", help="print a JSON object with question, beam score, seconds, …")
    add_decoding_arguments(parser)
    args = parser.parse_args()
    if sum(value is not None for value in (args.slide, args.features, args.image)) != 1:
        raise ValueError("give exactly one of --slide, --features and --image")
    return args


def main() -> int:
    args = parse_arguments()

    from inference.decoding import answer_samples, open_model
    from slide_reports import Prompt
    from slide_vlm import IGNORED_LABEL, VLMSettings

    began = time.perf_counter()
    settings = VLMSettings.read(args.model)
    check_input(args, settings)
    model, tokenizer = open_model(args)
    question = args.question or settings.question
    paths = args.slide or args.features or args.image
    prompt = Prompt(**settings.prompt)
    prompt_ids = prompt.question_ids(tokenizer, question, settings.max_question_tokens, num_images=len(paths))
    bare_ids = prompt.bare_question_ids(tokenizer, question, settings.max_question_tokens)
    case = read_case_of(args, model)
    labels = [IGNORED_LABEL] * len(prompt_ids)
    sample = {"input_ids": prompt_ids, "labels": labels, "question_ids": bare_ids, **case}
    decoding = {name: getattr(args, name) for name in ("num_beams", "max_new_tokens", "length_penalty")}
    ((report, score),) = answer_samples(model, tokenizer, [sample], **decoding)
    if args.evidence:
        write_case_evidence(args, model, tokenizer, sample, report, question)
    if args.json:
        details = {
            "id": ", ".join(Path(path).name for path in paths),
            "report": report,
            "question": question,
            "beam_score": score,
            "num_patches": sum(map(len, case.get("coords", []))) or None,
            "seconds": round(time.perf_counter() - began, 3),
        }
        print(json.dumps(details, indent=1))
    else:
        print(report)
    return DONE


def check_input(args, settings) -> None:
    """Refuse an input that does not exist or is not of the kind that the model takes, before anything is loaded."""
    for path in args.slide or args.features or args.image:
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such file")
    if args.assume_mpp is not None:
        from stage0_tiling.slide_list import check_mpp

        check_mpp(args.assume_mpp)
    if settings.input_kind == "images" and not args.image:
        raise ValueError(f"{args.model} was trained on images; give --image")
    if args.evidence and args.image:
        raise ValueError("--evidence shows tiles of slides; leave it out for images")
    if settings.input_kind == "features" and args.image:
        raise ValueError(f"{args.model} was trained on slides; give --slide or --features")
    if args.slide:
        tissue_sources_of(args).check_segmenter(settings.tiling.get("segmenter"))


def write_case_evidence(args, model, tokenizer, sample: dict, report: str, question: str) -> None:
    """Find what the report rests on and write it to the folder that --evidence names."""
    from inference.evidence import explain
    from inference.evidence_files import tiled_slide, tiled_slide_of_features, write_evidence

    if not report:
        print("--evidence: the report is empty, and rests on nothing", file=sys.stderr)
        return
    tiling = model.settings.tiling | {k: getattr(args, k) for k in ("tile_size", "mpp") if getattr(args, k) is not None}
    slides = [tiled_slide(path, tiling, args.assume_mpp) for path in args.slide or ()]
    slides += [tiled_slide_of_features(path) for path in args.features or ()]
    evidence = explain(model, tokenizer, sample, report)
    write_evidence(args.evidence, evidence, slides, {"model": str(args.model), "question": question})


def tissue_sources_of(args):
    """Files that the tissue of a slide is found with."""
    from stage0_tiling.tissue_sources import TissueSources, segmenter_file

    segmenter, preset = segmenter_file(args)
    return TissueSources(segmenter=segmenter, preset=preset)


def read_case_of(args, model) -> dict:
    """Patch tokens with coordinates, or pixels, of what the flags name."""
    from slide_reports import case_of_slides, making_of, patch_budget, read_case, read_images

    settings = model.settings
    budgets = {"num_patches": patch_budget(settings), "num_visual_tokens": settings.num_visual_tokens}
    if args.image:
        grid = model.encoder.patch_grid
        per_image = math.prod(grid) if grid else None
        paths = [Path(path) for path in args.image]
        return read_images(paths, model.encoder.transform, **budgets, patches_per_image=per_image)
    if args.features:
        return read_case([Path(path) for path in args.features], **budgets, expected=making_of(settings))

    from encoders import load_encoder
    from slide_features import MAKING_FACTS
    from slide_vlm import check_encoder
    from stage0_tiling.encoding import encode_slide

    name = args.vision_model_name or settings.encoder
    tiling = settings.tiling | {k: getattr(args, k) for k in ("tile_size", "mpp") if getattr(args, k) is not None}
    if name is None or not {"tile_size", "mpp"} <= tiling.keys():
        raise ValueError(
            f"{args.model} does not say how its slides were tiled and encoded (their feature files did not); say it "
            "with --vision_model_name, --tile_size and --mpp"
        )
    if unknown := tiling.keys() - MAKING_FACTS.keys():
        raise ValueError(f"{args.model} was trained on tiles with {', '.join(sorted(unknown))}; update SlideScribe")
    encoder = load_encoder(name).to(model.device)
    check_encoder(encoder, settings)
    slides = []
    for path in args.slide:
        slide = encode_slide(
            path,
            encoder,
            **tiling,
            sources=tissue_sources_of(args),
            assume_mpp=args.assume_mpp,
            batch_size=args.tile_batch_size,
            num_workers=args.num_workers,
        )
        print(f"{Path(path).name}: {len(slide.coords)} tiles", file=sys.stderr)
        slides.append(slide)
    return case_of_slides(slides, **budgets)


if __name__ == "__main__":
    run(main, to_go_on="run it again")
