r"""Score predicted reports against reference reports, beside two baselines that look at no image.

    python evaluation/score.py --predictions P.json --references R.json --output_dir DIR --train_json T.json

Writes DIR/metrics.json and prints a table. Files are `[{"id", "report"}]` (REG 2025), `{"id": "report"}` or
`{"id": ["report"]}`; of an R2Gen file (`{"train": [...], "val": [...], "test": [...]}`) the test part is the
references and the train part the training reports. Exit status: 0 all scored; 1 some predictions were missing (scored
as empty text); 2 refused.
"""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from command_line import DONE, SOME_FAILED, make_parser, run

NO_TRAIN_JSON = "baselines need the training reports: name them with --train_json"
COLUMNS = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "meteor", "exact_match")
NUM_IDS_SHOWN = 5


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__)
    files = parser.add_argument_group("files")
    files.add_argument("--predictions", type=Path, required=True, help="JSON of predicted reports")
    files.add_argument("--references", type=Path, required=True, help="JSON of reference reports")
    files.add_argument("--train_json", type=Path, default=None, help="JSON of training reports, for the baselines")
    files.add_argument("--output_dir", type=Path, required=True, help="folder that receives metrics.json")
    return parser.parse_args(argv)


def read_reports(path: Path, part: str) -> dict[str, str]:
    """Read id -> report from a JSON file in one of the forms above; `part` is the key taken of an R2Gen file.

    Raises FileNotFoundError, or ValueError naming the file, the record and what would do.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); give a UTF-8 JSON list of {{'id', 'report'}}") from None
    if isinstance(content, dict) and isinstance(content.get("train"), list):
        if part not in content:
            raise ValueError(f"{path}: an R2Gen file without a {part!r} part; it has {', '.join(content)}")
        content = content[part]
    if isinstance(content, dict):
        content = [{"id": key, "report": value} for key, value in content.items()]
    if not isinstance(content, list) or not content:
        raise ValueError(f"{path}: holds no records; give a JSON list of {{'id', 'report'}}")

    reports: dict[str, str] = {}
    for index, record in enumerate(content):
        key, report = check_record(record, f"{path}: record {index}")
        if key in reports:
            raise ValueError(f"{path}: record {index}: id {key!r} occurs a second time; keep one report per id")
        reports[key] = report
    return reports


def check_record(record: Any, where: str) -> tuple[str, str]:
    """Return (id, report) of one record, or raise ValueError that begins with `where`."""
    if not isinstance(record, dict) or "id" not in record or "report" not in record:
        raise ValueError(f"{where} is not {{'id', 'report'}}; give it both keys")
    key, report = record["id"], record["report"]
    if isinstance(key, bool) or not isinstance(key, str | int) or key == "":
        raise ValueError(f"{where}: id is {key!r}; give a string")
    if isinstance(report, list) and len(report) == 1:  # the form of coco-style score files
        report = report[0]
    if not isinstance(report, str):
        raise ValueError(f"{where} (id {key!r}): report is {report!r:.60}; give a string, an empty one for no report")
    return str(key), report


def score_pairs(hypotheses: list[str], references: list[str], wordnet: Any | None) -> dict[str, float]:
    """All metrics of one list of hypotheses, each between 0 and 1, and the number of pairs `n`."""
    from evaluation.metrics.coco_bleu import coco_bleu
    from evaluation.metrics.coco_rouge import coco_rouge_l
    from evaluation.metrics.exact_match import exact_match
    from evaluation.metrics.meteor import meteor

    return {
        **coco_bleu(hypotheses, references),
        "rouge_l": coco_rouge_l(hypotheses, references),
        "meteor": meteor(hypotheses, references, wordnet),
        "exact_match": exact_match(hypotheses, references),
        "n": len(references),
    }


def score_baselines(train: list[str], references: list[str], wordnet: Any | None) -> dict[str, dict[str, Any]]:
    """Score the most frequent training report, and the most frequent one of each reference's own organ.

    An organ that no training report names takes the constant report.
    """
    from evaluation.fields import organ

    constant = Counter(train).most_common(1)[0][0]
    by_organ: dict[str, Counter[str]] = {}
    for report in train:
        by_organ.setdefault(organ(report), Counter())[report] += 1
    modal = {name: reports.most_common(1)[0][0] for name, reports in by_organ.items()}
    guesses = [modal.get(organ(reference), constant) for reference in references]
    used = {name: modal[name] for name in sorted({organ(reference) for reference in references} & modal.keys())}
    return {
        "constant": {**score_pairs([constant] * len(references), references, wordnet), "report": constant},
        "organ_modal": {**score_pairs(guesses, references, wordnet), "reports": used},
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Lay out one line per row, one column per metric."""
    head = f"{'':<14}" + "".join(f"{name:>13}" for name in COLUMNS)
    lines = [f"{name:<14}" + "".join(f"{row[column]:>13.4f}" for column in COLUMNS) for name, row in rows.items()]
    return "\n".join([head, *lines])


def log(message: str) -> None:
    """Say one line on stderr; stdout is for results."""
    print(f"score.py: {message}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = parse_args(argv)

    # Data
    predictions = read_reports(args.predictions, part="test")
    references = read_reports(args.references, part="test")
    train = read_reports(args.train_json, part="train") if args.train_json else {}
    if not predictions.keys() & references.keys():
        raise ValueError(f"{args.predictions}: not one id of {args.references}; are these files of the same run?")
    missing = [key for key in references if key not in predictions]
    extra = [key for key in predictions if key not in references]
    hypotheses = [predictions.get(key, "") for key in references]
    targets = list(references.values())

    # Score
    from evaluation.metrics.meteor import WITH_SYNONYMS, WITHOUT_SYNONYMS, open_wordnet
    from slide_features import atomic_path

    wordnet = open_wordnet()
    metrics: dict[str, Any] = score_pairs(hypotheses, targets, wordnet)
    metrics["meteor_variant"] = WITH_SYNONYMS if wordnet else WITHOUT_SYNONYMS
    metrics["missing_predictions"] = missing
    metrics["extra_predictions"] = extra
    metrics["empty_predictions"] = sum(not hypothesis.strip() for hypothesis in hypotheses) - len(missing)
    metrics["baselines"] = score_baselines(list(train.values()), targets, wordnet) if train else None
    if train:
        seen = set(train.values())
        metrics["references_seen_in_training"] = sum(target in seen for target in targets)
    else:
        metrics["baselines_missing_because"] = NO_TRAIN_JSON

    # Save
    with atomic_path(args.output_dir / "metrics.json") as partial:
        partial.write_text(json.dumps(metrics, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(table({"predictions": metrics, **(metrics["baselines"] or {})}))
    print(f"{len(targets)} references, METEOR: {metrics['meteor_variant']}")
    if wordnet is None:
        log(f"{WITHOUT_SYNONYMS}: no WordNet in nltk's data folders or /usr/share/wordnet")
    if not train:
        log(NO_TRAIN_JSON)
    if extra:
        log(f"{len(extra)} predictions have no reference and were left out: {shown(extra)}")
    if missing:
        log(f"{len(missing)} references have no prediction and were scored as empty text: {shown(missing)}")
    return SOME_FAILED if missing else DONE


def shown(ids: list[str]) -> str:
    """First few ids of a list, for a message; metrics.json has them all."""
    return ", ".join(ids[:NUM_IDS_SHOWN]) + (", …" if len(ids) > NUM_IDS_SHOWN else "")


if __name__ == "__main__":
    run(main, to_go_on="run it again")
