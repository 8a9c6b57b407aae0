r"""Score predicted reports against reference reports, beside baselines that look at no image.

    python evaluation/score.py --predictions P.json --references R.json --output_dir DIR --train_json T.json

Writes to DIR: metrics.json (every figure), mistakes.json (clinically serious mistakes, the gravest first), cases.csv
(metrics of each report), report.html (all of it to look at) and pictures. Prints a table.

Files are `[{"id", "report"}]` (REG 2025), `{"id": "report"}` or `{"id": ["report"]}`; of an R2Gen file (`{"train": […],
"val": […], "test": […]}`) the test part is the references and the train part the training reports. Exit status: 0
all scored; 1 some predictions were missing or unusable (scored as empty text); 2 refused.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from jsonargparse.typing import NonNegativeInt

from command_line import DONE, SOME_FAILED, check_output_folder, counted, make_parser, run

NO_TRAIN_JSON = "baselines need the training reports: name them with --train_json"
NO_TEXT_MODELS = "KEY needs --entity_model, EMB and BERTScore --embedding_model"
COLUMNS = ("bleu_1", "bleu_4", "rouge_l", "meteor", "cider_d", "chrf", "reg_rouge", "reg_bleu", "exact_match")


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__)
    files = parser.add_argument_group("files")
    files.add_argument("--predictions", type=Path, required=True, help="JSON of predicted reports")
    files.add_argument("--references", type=Path, required=True, help="JSON of reference reports")
    files.add_argument("--train_json", type=Path, default=None, help="JSON of training reports, for the baselines")
    files.add_argument("--output_dir", type=Path, required=True, help="folder that receives the results")
    beside = parser.add_argument_group("beside the result")
    beside.add_argument("--features_dir", type=Path, default=None, help="feature files, for the retrieval baseline")
    beside.add_argument(
        "--shuffled_predictions",
        type=Path,
        default=None,
        help="JSON of reports that the model wrote from other slides' features; by default its predictions "
        "are exchanged",
    )
    beside.add_argument("--group_pattern", default=None, help="regular expression that finds the patient in an id")
    beside.add_argument(
        "--num_resamples", type=NonNegativeInt, default=1000, help="bootstrap samples; 0 for no intervals"
    )
    beside.add_argument("--seed", type=NonNegativeInt, default=0, help="of resampling and shuffling")
    models = parser.add_argument_group("models of texts (none is downloaded)")
    models.add_argument("--entity_model", default=None, help="spaCy model for KEY, such as en_core_sci_lg, or a folder")
    models.add_argument("--embedding_model", default=None, help="transformers model for EMB and BERTScore, or a folder")
    models.add_argument("--device", default="cpu", help="where the embedding model runs")
    survival = parser.add_argument_group("survival, where the references carry follow-up")
    survival.add_argument("--time_field", default="time", help="field of the references: time to event or censoring")
    survival.add_argument("--event_field", default="event", help="field of the references: 1 event, 0 censored")
    survival.add_argument(
        "--risks", type=Path, default=None, help="CSV or JSON of id and risk, as a survival head gives"
    )
    page = parser.add_argument_group("page")
    page.add_argument("--stage0_dir", type=Path, default=None, help="output of stage 0, whose thumbnails are shown")
    page.add_argument(
        "--evidence_dir", type=Path, default=None, help="what --evidence of generate.py wrote, or <slide_id>.png"
    )
    page.add_argument("--gallery", type=NonNegativeInt, default=24, help="cases shown on the page beside the mistakes")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = parse_args(argv)
    check_output_folder(args.output_dir)

    # Data
    from evaluation.report_files import WHAT_WAS_DONE, pair_reports, read_reports, shown

    predictions = read_reports(args.predictions, part="test")
    references = read_reports(args.references, part="test")
    train = read_reports(args.train_json, part="train") if args.train_json else None
    pairs = pair_reports(predictions, references, str(args.predictions))
    patients = patients_of([*pairs.ids, *(train.texts if train else ())], args.group_pattern)

    # Score
    from evaluation.rows import make_rows, score_rows, verbatim_and_distinct

    rows = make_rows(args, pairs, train, patients)
    models = open_models(args)
    metrics, pair_scores = score_rows(rows, pairs, models, patients, args)
    metrics |= {kind: ids for kind, ids in pairs.problems.items() if kind.endswith("_predictions")}
    metrics["empty_predictions"] = len(metrics["empty_predictions"])
    metrics["input_problems"] = {kind: len(ids) for kind, ids in pairs.problems.items()}
    metrics |= verbatim_and_distinct(pairs, train)
    if train is None:
        metrics["baselines_missing_because"] = NO_TRAIN_JSON

    from evaluation.clinical import score_clinically

    clinical = score_clinically(pairs, predictions, references, patients, args)
    metrics |= clinical.metrics

    # Save
    from evaluation.results import save_results

    save_results(args, pairs, metrics, pair_scores, clinical)
    print_results(metrics, clinical)
    for kind, ids in pairs.problems.items():
        if ids:
            log(f"{len(ids)} {WHAT_WAS_DONE[kind]}: {shown(ids)}")
    return SOME_FAILED if pairs.has_failures else DONE


def patients_of(ids: Sequence[str], pattern: str | None) -> dict[str, str]:
    """Patient of each id, as training groups them."""
    import re

    from slide_reports.record import patient_of, slide_id_of

    try:
        re.compile(pattern or "")
    except re.error as error:
        raise ValueError(f"--group_pattern {pattern!r} is no regular expression ({error})") from None
    return {key: patient_of(slide_id_of(key), pattern) for key in ids}


def open_models(args: Namespace) -> Any:
    """Open WordNet where there is one, and the models that were asked for."""
    from evaluation.metrics.meteor.formula import WITHOUT_SYNONYMS, open_wordnet
    from evaluation.text_metrics import TextModels

    models = TextModels(wordnet=open_wordnet())
    if models.wordnet is None:
        log(f"{WITHOUT_SYNONYMS}: no WordNet in nltk's data folders or /usr/share/wordnet")
    if args.entity_model:
        from evaluation.metrics.reg_score.formula import load_entities

        models.entities = load_entities(args.entity_model)
    if args.embedding_model:
        from evaluation.metrics.text_encoder import TextEncoder

        models.encoder = TextEncoder(args.embedding_model, device=args.device)
    return models


def print_results(metrics: dict[str, Any], clinical: Any) -> None:
    """Serious mistakes first, then the table of metrics, on stdout; what is missing on stderr."""
    from evaluation.mistakes import KINDS

    mistakes = metrics["mistakes"]
    print(f"clinically serious mistakes in {mistakes['cases_affected']} of {counted(metrics['n'], 'report')}")
    for kind, count in mistakes["by_kind"].items():
        print(f"  {count:>6}  {kind}: {KINDS[kind]}")
    print()
    shuffled = metrics["shuffled_images"]
    print(
        table({"predictions": metrics} | (metrics["baselines"] or ({"shuffled_images": shuffled} if shuffled else {})))
    )
    print(f"{metrics['n']} references, METEOR: {metrics['meteor_variant']}")
    reg = metrics["reg"]
    if reg["reg_score"] is None:
        print(f"REG score {reg['reg_status']}")
    else:
        print(
            f"REG score {reg['reg_score']:.4f}; the references themselves would get {reg['reg_ceiling']['ceiling']:.4f}"
        )
    if reg["reg_score"] is None:
        log(NO_TEXT_MODELS)
    if "baselines_missing_because" in metrics:
        log(NO_TRAIN_JSON)


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Lay out one line per row, one column per metric."""
    head = f"{'':<16}" + "".join(f"{name:>12}" for name in COLUMNS)
    lines = [f"{name:<16}" + "".join(f"{row[column]:>12.4f}" for column in COLUMNS) for name, row in rows.items()]
    return "\n".join([head, *lines])


def log(message: str) -> None:
    """Say one line on stderr; stdout is for results."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)


if __name__ == "__main__":
    run(main, to_go_on="run it again")
