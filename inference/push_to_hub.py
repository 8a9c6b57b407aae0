r"""Upload a trained model to the Hugging Face hub, with a model card made of what its run and its scores say.

  python inference/push_to_hub.py --model runs/stage2/final_model --metrics scores/metrics.json --dry_run
  python inference/push_to_hub.py --model runs/stage2/final_model --metrics scores/metrics.json --repo_id org/name

Read the card (--dry_run writes README.md into the model's folder and uploads nothing) and mend it before you upload: an
existing README.md is kept unless you give --overwrite. The repository is private unless you say --public.
"""

import json
import sys
from pathlib import Path

from command_line import DONE, make_parser, run

SPEAKING_OF_PATHS = ("vlm.json", "config.json", "adapter_config.json", "tokenizer_config.json")


def parse_arguments():
    parser = make_parser(__doc__)
    parser.add_argument("--model", required=True, help="final_model folder of stage 1 or 2")
    parser.add_argument("--repo_id", default=None, help="org/name on the hub; needed unless --dry_run")
    parser.add_argument("--metrics", default=None, help="metrics.json of evaluation/score.py")
    parser.add_argument("--run_json", default=None, help="of the training run; default: run.json beside the model")
    parser.add_argument(
        "--license", default=None, help="licence of your weights, by the hub's name; the base model's terms hold too"
    )
    parser.add_argument("--public", action="store_true", help="let everybody see a repository that is made now")
    parser.add_argument("--overwrite", action="store_true", help="write the model card anew")
    parser.add_argument("--dry_run", action="store_true", help="write the model card only")
    args = parser.parse_args()
    if not (args.repo_id or args.dry_run):
        raise ValueError("give --repo_id, or --dry_run to write the model card only")
    return args


def main() -> int:
    args = parse_arguments()

    from inference.model_card import model_card, read_json
    from slide_features import atomic_path
    from vlm_settings import VLMSettings

    folder = Path(args.model)
    settings = VLMSettings.read(folder)
    beside = folder.parent / "run.json"
    run_json = read_json(args.run_json or (beside if beside.is_file() else None), "--run_json")
    metrics = read_json(args.metrics, "--metrics")
    card = folder / "README.md"
    if args.overwrite or not card.is_file():
        parts = [path.name for path in folder.iterdir() if path.is_dir()]
        text = model_card(settings, run_json, metrics, licence=args.license, repo_id=args.repo_id, parts=parts)
        with atomic_path(card) as partial:
            partial.write_text(text, encoding="utf-8")
        print(f"model card: {card}", file=sys.stderr)
    else:
        print(f"model card: {card} stays as it is; --overwrite writes it anew", file=sys.stderr)
    if args.dry_run:
        return DONE
    print(upload(folder, args.repo_id, public=args.public))
    return DONE


def upload(folder: Path, repo_id: str, *, public: bool) -> str:
    """Upload the files that a result folder may hold, in one commit, and return where they are.

    Paths of this machine in its JSON files are shortened to their last part.

    Raises:
        PermissionError, ConnectionError, FileNotFoundError: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.utils import filter_repo_objects

    from hub_access import explained
    from inference.loading import HUB_FILES
    from inference.model_card import PLACE, without_folders

    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    operations = []
    for name in filter_repo_objects(names, allow_patterns=HUB_FILES):
        content: str | bytes = str(folder / name)
        if Path(name).name in SPEAKING_OF_PATHS:
            content = json.dumps(without_folders(json.loads((folder / name).read_text())), indent=2).encode()
        if name == "README.md":
            content = (folder / name).read_text(encoding="utf-8").replace(PLACE, repo_id).encode()
        operations.append(CommitOperationAdd(name, content))
    with explained(f"model {repo_id}", repo_id):
        api = HfApi()
        api.create_repo(repo_id, repo_type="model", private=not public, exist_ok=True)
        api.create_commit(repo_id, operations, commit_message="Upload a SlideScribe model")
        return f"{api.endpoint}/{repo_id}"


if __name__ == "__main__":
    run(main, to_go_on="run it again")
