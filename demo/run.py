r"""The whole of SlideScribe on slides made here: no download, a few minutes on two CPU cores.

    python demo/run.py

Makes slides with reports, trains a small image encoder and a small Gemma-3n, then runs stage 0, stage 1, stage 2,
inference and evaluation with the commands of the README. Everything lies under demo/output, which is emptied first.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

from command_line import DONE, make_parser, run
from demo.contact_sheet import draw_contact_sheet
from evaluation.fields import organ

ROOT = Path(__file__).resolve().parent.parent
TILING = ["--tile_size", "64", "--mpp", "2", "--min_tissue", "0.4"]


def parse_arguments():
    parser = make_parser(__doc__)
    parser.add_argument("--output_dir", default="demo/output", help="folder to empty and fill")
    parser.add_argument("--num_train", type=int, default=200, help="training slides")
    parser.add_argument("--num_test", type=int, default=48, help="held-out slides, of other patients")
    parser.add_argument("--seed", type=int, default=0, help="of slides and of all training")
    parser.add_argument("--encoder_epochs", type=int, default=6, help="passes over the training tiles")
    parser.add_argument("--llm_steps", type=int, default=180, help="optimizer steps of the language model")
    parser.add_argument("--stage1_epochs", type=int, default=30, help="passes over the training slides in stage 1")
    parser.add_argument("--stage2_epochs", type=int, default=10, help="passes over the training slides in stage 2")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    began = time.monotonic()
    out = Path(args.output_dir).resolve()
    if out.is_relative_to(ROOT):  # the commands run in the root, and read better with short paths
        os.chdir(ROOT)
        out = out.relative_to(ROOT)
    if out.exists() and any(out.iterdir()) and not (out / "make_slides.json").exists():
        raise ValueError(f"--output_dir {out} holds something that is not a demo; name an empty folder")
    shutil.rmtree(out, ignore_errors=True)
    train_json, test_json, features = out / "train.json", out / "test.json", out / "stage0" / "features"
    seed = ["--seed", args.seed]

    step("Make slides and reports", "demo/make_slides.py", "--output_dir", out, *seed,
         "--num_train", args.num_train, "--num_test", args.num_test)  # fmt: skip
    step("Stage 0: tile the slides", "stage0_tiling/tile.py", "--slides", out / "slides",
         "--output_dir", out / "stage0", *TILING)  # fmt: skip
    step("Train a small image encoder", "demo/train_encoder.py", "--data_dir", out,
         "--coords_dir", out / "stage0" / "coords", "--output_dir", out / "encoder",
         "--num_epochs", args.encoder_epochs, *seed)  # fmt: skip
    step("Train a small Gemma-3n on the reports' text", "demo/train_llm.py", "--train_json", train_json,
         "--output_dir", out / "llm", "--num_steps", args.llm_steps, *seed)  # fmt: skip
    step("Stage 0: encode the tiles", "stage0_tiling/encode.py", "--slides", out / "slides",
         "--output_dir", out / "stage0", *TILING, "--encoder", out / "encoder", launch=True)  # fmt: skip

    data = ["--train_json", train_json, "--features_dir", features, "--num_workers", 0, *seed]
    step("Stage 1: train the projector", "stage1_projector/train.py", *data, "--llm_name", out / "llm",
         "--num_visual_tokens", 32, "--batch_size", 16, "--num_epochs", args.stage1_epochs, "--learning_rate", 3e-3,
         "--output_dir", out / "stage1", launch=True)  # fmt: skip
    predict(out / "stage1", out, "Write the held-out reports with stage 1 alone")
    score(out / "stage1", out)
    step("Stage 2: fine-tune the language model", "stage2_finetune/train.py", *data,
         "--stage1_projector_path", out / "stage1" / "final_model", "--llm_training", "lora",
         "--unfreeze_projection_layer", "--batch_size", 16, "--num_epochs", args.stage2_epochs, "--learning_rate", 2e-3,
         "--output_dir", out / "stage2", launch=True)  # fmt: skip
    predict(out / "stage2", out, "Write the held-out reports")
    shutil.copy(out / "stage2" / "predictions.json", out / "predictions.json")

    references = {row["id"]: row["report"] for row in json.loads(test_json.read_text())}
    slide = next(iter(references))
    written = step("Write the report of one held-out slide, and which tiles it rests on", "inference/generate.py",
                   "--model", out / "stage2" / "final_model", "--slide", out / "slides" / slide,
                   "--evidence", out / "evidence")  # fmt: skip
    score(out / "stage2", out, "--evidence_dir", out / "evidence")

    summary = {**summarise(out / "stage2", references), **summarise(out / "stage1", references, prefix="stage1_")}
    summary = {"seconds": round(time.monotonic() - began, 1), "n_test": len(references), **summary}
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    draw_contact_sheet(out, out / "contact_sheet.png")

    print(f"\n{slide}\n\n  written:\n{indent(written)}\n\n  reference:\n{indent(references[slide])}\n")
    for name, value in summary.items():
        print(f"{name:<36}{value}")
    page = out / "stage2" / "scores" / "report.html"
    print(f"\nLook at {out / 'contact_sheet.png'}, and open {page}: mistakes, scores beside baselines, every case.")
    return DONE


def step(title: str, script: str, *flags: object, launch: bool = False) -> str:
    """Run one of the project's commands, under ``accelerate launch`` if asked, and return what it printed on stdout."""
    words = [script, *map(str, flags)]
    shown = ["accelerate", "launch", *words] if launch else ["python", *words]
    print(f"\n{title}\n$ {' '.join(shown)}", file=sys.stderr, flush=True)
    module = ["-m", "accelerate.commands.launch", "--num_processes", "1"] if launch else []
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, *module, *words], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
    )
    if done.returncode != 0:
        raise ValueError(f"{script} left with exit status {done.returncode}; its message is above")
    print(f"{time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return done.stdout.rstrip()


def environment() -> dict[str, str]:
    """Environment of the commands: offline, and nothing asked of a terminal."""
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return (
        os.environ | quiet | {"OMP_WAIT_POLICY": "PASSIVE"}
    )  # idle threads sleep, so that a busy machine stays usable


def predict(run_dir: Path, out: Path, title: str) -> None:
    """Write the held-out reports with one stage's result."""
    step(title, "inference/predict.py", "--model", run_dir / "final_model", "--test_json", out / "test.json",
         "--features_dir", out / "stage0" / "features", "--output", run_dir / "predictions.json",
         "--batch_size", 16, "--max_new_tokens", 80, launch=True)  # fmt: skip


def score(run_dir: Path, out: Path, *flags: object) -> None:
    """Score the held-out reports of one stage's result, beside baselines and with pictures of the slides."""
    print(step("Score them", "evaluation/score.py", "--predictions", run_dir / "predictions.json",
               "--references", out / "test.json", "--train_json", out / "train.json",
               "--features_dir", out / "stage0" / "features", "--stage0_dir", out / "stage0", *flags,
               "--output_dir", run_dir / "scores"))  # fmt: skip


def summarise(run_dir: Path, references: dict[str, str], prefix: str = "") -> dict[str, float]:
    """Accuracies of one stage's predictions, and of the same model given another slide's features."""
    predictions = {row["id"]: row["report"] for row in json.loads((run_dir / "predictions.json").read_text())}
    metrics = json.loads((run_dir / "scores" / "metrics.json").read_text())
    pairs = [(predictions[slide], reference) for slide, reference in references.items()]
    # Decoding is deterministic, so what the model writes from another slide's features is that slide's prediction.
    shuffled = shuffled_pairs(predictions, references)
    summary = {
        "organ_accuracy": share(organ(written) == organ(reference) for written, reference in pairs),
        "exact_match": metrics["exact_match"],
        "rouge_l": metrics["rouge_l"],
        "exact_match_shuffled_images": share(written.split() == reference.split() for written, reference in shuffled),
        "exact_match_constant": metrics["baselines"]["constant"]["exact_match"],
        "exact_match_organ_modal": metrics["baselines"]["organ_modal"]["exact_match"],
    }
    return {prefix + name: round(value, 4) for name, value in summary.items()}


def shuffled_pairs(predictions: dict[str, str], references: dict[str, str], repeats: int = 20) -> list[tuple[str, str]]:
    """Pair each reference with the prediction of another slide, drawn at random, several times over."""
    rng, slides = random.Random(0), list(references)
    others = [(slide, rng.choice([other for other in slides if other != slide])) for slide in slides * repeats]
    return [(predictions[other], references[slide]) for slide, other in others]


def share(hits) -> float:
    hits = list(hits)
    return sum(hits) / len(hits)


def indent(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


if __name__ == "__main__":
    run(main, to_go_on="run it again")
