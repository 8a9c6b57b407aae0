r"""Compare image encoders under the same training: one command runs every stage for each and puts the scores together.

  python stage0_encoder/compare_encoders.py --config recipes/compare_encoders.yaml

For each of --encoders: train_classifier.py where the recipe says so, encode.py (or --image_root as it is), stages 1 and
2, predict.py and score.py, all with the same records and flags. A step that was done with the same flags is not done
again; an encoder that fails is listed and the others go on. Writes a folder for each encoder, and comparison.csv,
comparison.json, comparison.md and comparison.png.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from jsonargparse.typing import PositiveInt
from tqdm import tqdm

from command_line import DONE, SOME_FAILED, check_output_folder, make_parser, run
from slide_features import atomic_path
from slide_reports import read_records
from stage0_encoder.comparison_steps import StepFailed, do_steps, plan_steps
from stage0_encoder.comparison_table import FAILED, METRICS, draw, row_of, write_tables

ENTRY_KEYS = {"name", "encoder", "train"}
STAGE_FLAGS = ("train_classifier", "stage0", "stage1", "stage2", "predict", "score")


def parse_arguments():
    parser = make_parser(__doc__)
    group = parser.add_argument_group("Comparison")
    group.add_argument(
        "--encoders",
        type=list[dict[str, Any]],
        required=True,
        help="in the recipe: a list of `encoder`, a name or folder as of encode.py; `name`, which its folder and row "
        "have; and `train`, flags of train_classifier.py (--encoder among them), which trains it first",
    )
    group.add_argument("--train_json", required=True, help="training records of all stages")
    group.add_argument("--val_json", default=None, help="validation records; default: patients split off --train_json")
    group.add_argument("--test_json", required=True, help="records with reports to be scored on")
    group.add_argument("--slides", nargs="+", default=None, help="folders, files or lists of slides")
    group.add_argument("--image_root", default=None, help="folder of images, where the records are of images")
    group.add_argument("--output_dir", required=True, help="folder of the comparison; made when missing")
    group.add_argument("--seed", type=int, default=0, help="of all training")
    group.add_argument("--num_processes", type=PositiveInt, default=1, help="of each step, by `accelerate launch`")
    group.add_argument("--metrics", nargs="+", default=list(METRICS), help="of score.py, shown in table and figure")
    group.add_argument("--overwrite", action="store_true", help="do all steps anew")
    stages = parser.add_argument_group("Flags of the commands, in the recipe by name")
    stages.add_argument("--train_classifier", type=dict[str, Any], default={}, help="of every encoder's `train`")
    stages.add_argument("--stage0", type=dict[str, Any], default={}, help="of stage0_tiling/encode.py")
    stages.add_argument("--stage1", type=dict[str, Any], default={}, help="of stage1_projector/train.py")
    stages.add_argument("--stage2", type=dict[str, Any], default={}, help="of stage2_finetune/train.py")
    stages.add_argument("--predict", type=dict[str, Any], default={}, help="of inference/predict.py")
    stages.add_argument("--score", type=dict[str, Any], default={}, help="of evaluation/score.py")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    check_output_folder(args.output_dir)
    entries = checked_entries(args.encoders)
    check_data(args)
    output = Path(args.output_dir)
    settings = {name: getattr(args, name) or {} for name in STAGE_FLAGS}
    data = {name: getattr(args, name) for name in ("train_json", "val_json", "test_json", "slides", "image_root")}
    references = write_references(args.test_json, output / "references.json")
    data["references"] = str(references)
    data["training_reports"] = str(write_references(args.train_json, output / "training_reports.json"))
    rows, results = [], {}
    plans = {name: plan_steps(entry, output / name, data, settings, seed=args.seed) for name, entry in entries.items()}
    progress = tqdm(total=sum(map(len, plans.values())), unit="step", desc="comparing")
    for name, steps in plans.items():
        folder, failure = output / name, ""
        try:
            do_steps(steps, folder, args.num_processes, overwrite=args.overwrite, on_step=progress)
        except StepFailed as error:
            failure = str(error)
            print(f"{name}: {failure}", file=sys.stderr)
        row, metrics = row_of(name, folder, steps, args.metrics, failure)
        rows.append(row)
        if metrics is not None:
            results[name] = metrics
        write_tables(rows, args.metrics, output)  # after each encoder: there is something to look at
        if results:
            draw(results, rows, args.metrics, output / "comparison.png")
    progress.close()
    print((output / "comparison.md").read_text(), end="")
    return SOME_FAILED if any(row["status"] == FAILED for row in rows) else DONE


def write_references(annotation: str, path: Path) -> Path:
    """Write the reports of an annotation file of any form as score.py reads them; of a split, those that say test."""
    records = read_records(annotation, locate_inputs=False)
    of_test = [record for record in records if record.split == "test"] if path.stem == "references" else []
    reports = {record.id: record.answer for record in of_test or records}
    with atomic_path(path) as partial:
        partial.write_text(json.dumps([{"id": key, "report": text} for key, text in reports.items()], indent=1))
    return path


def checked_entries(encoders: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The encoders by name.

    Raises:
        ValueError: an entry has unknown keys, names no encoder, or a name that is no folder's or is another's too.
    """
    entries: dict[str, dict[str, Any]] = {}
    for number, entry in enumerate(encoders, start=1):
        where = f"--encoders: entry {number}"
        if unknown := sorted(set(entry) - ENTRY_KEYS):
            raise ValueError(f"{where} has {unknown[0]!r}; expected of {', '.join(sorted(ENTRY_KEYS))}")
        train = entry.get("train")
        if train is not None and not isinstance(train, dict):
            raise ValueError(f"{where}: train is {train!r:.60}; give flags of train_classifier.py by name")
        if ("encoder" in entry) == (train is not None):
            raise ValueError(f"{where}: give either encoder, a name or folder, or train, flags of train_classifier.py")
        default = re.sub(r"[^\w.-]+", "_", str(entry.get("encoder", "")).rstrip("/").split("/")[-1])
        name = str(entry.get("name") or default)
        if not re.fullmatch(r"[\w][\w.-]*", name):
            raise ValueError(f"{where}: name is {name!r}; use letters, digits, _, - and .")
        if name in entries:
            raise ValueError(f"{where}: the name {name} is another's too; give each its own name")
        entries[name] = entry
    if not entries:
        raise ValueError("--encoders is empty; name at least one")
    return entries


def check_data(args) -> None:
    """Refuse missing files and contradicting flags before any work."""
    if bool(args.slides) == bool(args.image_root):
        raise ValueError("give either --slides or --image_root")
    for flag in ("train_json", "val_json", "test_json", "image_root"):
        path = getattr(args, flag)
        if path and not Path(path).exists():
            raise FileNotFoundError(f"--{flag} {path}: no such file or folder")
    if "llm_name" not in (args.stage1 or {}):
        raise ValueError("--stage1 needs llm_name, the language model that all encoders are compared with")


if __name__ == "__main__":
    run(main)
