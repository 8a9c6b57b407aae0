"""The rows of a result: the predictions, and beside them every baseline, scored alike."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jsonargparse import Namespace

from evaluation.baselines import constant_report, organ_modal_guesses, retrieval_guesses, shuffled_guesses
from evaluation.field_scores import value_of
from evaluation.fields import parse_all
from evaluation.metrics.cider_d.formula import DocumentFrequency, document_frequency
from evaluation.metrics.meteor.formula import WITH_SYNONYMS, WITHOUT_SYNONYMS
from evaluation.metrics.reg_score.formula import WEIGHTS, reg_score, reg_status
from evaluation.mistakes import find_mistakes
from evaluation.parallel import map_in_processes, slices
from evaluation.report_files import PairedReports, Reports, read_reports
from evaluation.resampling import intervals, sums_by_patient
from evaluation.text_metrics import PairScores, TextModels, joined, score_pairs

PAIRS_AT_A_TIME = 1250
TEXT_LIBRARIES = ("nltk.translate.meteor_score", "rouge_score.tokenizers", "sacrebleu.tokenizers.tokenizer_13a")


@dataclass
class Row:
    """Predictions of one kind and the references they are scored against; `about` goes into metrics.json."""

    hypotheses: Sequence[str]
    references: Sequence[str]
    about: dict[str, Any]


def make_rows(
    args: Namespace, pairs: PairedReports, train: Reports | None, patients: Mapping[str, str]
) -> dict[str, Row]:
    """The predictions, and the baselines that can be made of what was given."""
    rows = {"predictions": Row(pairs.hypotheses, pairs.references, {})}
    if train is not None:
        usable = {key: text for key, text in train.texts.items() if text.strip()}
        if not usable:
            raise ValueError(f"--train_json {args.train_json}: not one report is a text")
        reports = list(usable.values())
        constant = constant_report(reports)
        rows["constant"] = Row([constant] * len(pairs.ids), pairs.references, {"report": constant})
        guesses, used = organ_modal_guesses(reports, pairs.references)
        rows["organ_modal"] = Row(guesses, pairs.references, {"reports": used})
        if args.features_dir:
            guesses, without = retrieval_guesses(usable, pairs.ids, args.features_dir, patients)
            rows["retrieval"] = Row(guesses, pairs.references, {"slides_without_features": len(without)})
    if args.shuffled_predictions:
        shuffled = read_reports(args.shuffled_predictions, part="test")
        guesses = [shuffled.texts.get(key, "") for key in pairs.ids]
        missing = sum(key not in shuffled.texts for key in pairs.ids)
        about = {"made_by": "the model, from other slides' features", "missing": missing}
        rows["shuffled_images"] = Row(guesses, pairs.references, about)
    else:
        guesses, places = shuffled_guesses(pairs.ids, pairs.hypotheses, pairs.references, seed=args.seed)
        if guesses:
            about = {"made_by": "exchanging the predictions among slides"}
            rows["shuffled_images"] = Row(guesses, [pairs.references[place] for place in places], about)
    return rows


def score_rows(
    rows: Mapping[str, Row], pairs: PairedReports, models: TextModels, patients: Mapping[str, str], args: Namespace
) -> tuple[dict[str, Any], PairScores]:
    """Metrics of all rows in the form of metrics.json, and the predictions' scores pair by pair."""
    scored = _score_all(rows, models)
    ours = scored["predictions"]
    metrics: dict[str, Any] = ours.corpus() | {"n": len(pairs.ids)}
    owners = [patients[key] for key in pairs.ids]
    metrics["num_patients"] = len(set(owners))
    metrics["intervals_95"] = {}
    if args.num_resamples:
        sums = sums_by_patient(ours.stacked(), owners)
        metrics["intervals_95"] = intervals(sums, ours.scores_of, num_resamples=args.num_resamples, seed=args.seed)
    metrics["meteor_variant"] = WITH_SYNONYMS if models.wordnet else WITHOUT_SYNONYMS
    metrics["reg"] = _reg(ours, pairs, models)
    others = {
        name: scored[name].corpus() | {"n": len(row.references)} | row.about
        for name, row in rows.items()
        if name != "predictions"
    }
    metrics["baselines"] = others if "constant" in others else None
    metrics["shuffled_images"] = others.get("shuffled_images")
    return metrics, ours


def _score_all(rows: Mapping[str, Row], models: TextModels) -> dict[str, PairScores]:
    """Score all rows, in slices so that processes share the work evenly and memory stays flat."""
    tasks = [(name, part) for name, row in rows.items() for part in slices(len(row.references), PAIRS_AT_A_TIME)]
    documents: dict[str, DocumentFrequency] = {}  # counted once for rows that share their references
    for name, row in rows.items():
        same = next((other for other in documents if rows[other].references is row.references), None)
        documents[name] = documents[same] if same else document_frequency(row.references)
    plain = models.encoder is None and models.entities is None
    num_pairs = sum(len(row.references) for row in rows.values())
    shared = rows, models, documents
    scores = map_in_processes(_score_slice, shared, tasks, num_items=num_pairs, plain=plain, imports=TEXT_LIBRARIES)
    parts: dict[str, list[PairScores]] = {}
    for (name, _), score in zip(tasks, scores, strict=True):
        parts.setdefault(name, []).append(score)
    return {name: joined(scored) for name, scored in parts.items()}


def _score_slice(shared: Any, task: tuple[str, slice]) -> PairScores:
    rows, models, documents = shared
    row, part = rows[task[0]], task[1]
    return score_pairs(row.hypotheses[part], row.references[part], models, documents[task[0]])


def measure(pairs: PairedReports, models: TextModels) -> PairScores:
    """Text metrics of each pair, and whether it has no serious mistake, the right organ, the right diagnoses.

    The last three are among the `means`: `no_serious_mistake`, `organ_right`, `diagnoses_right`.
    """
    scores = score_pairs(pairs.hypotheses, pairs.references, models)
    known = parse_all([*pairs.hypotheses, *pairs.references])
    predicted = [known[text] for text in pairs.hypotheses]
    expected = [known[text] for text in pairs.references]
    wrong = {mistake.id for mistake in find_mistakes(pairs.ids, pairs.hypotheses, predicted, expected)}
    scores.means["no_serious_mistake"] = np.array([float(key not in wrong) for key in pairs.ids])
    for name in ("organ", "diagnoses"):
        equal = [float(value_of(a, name) == value_of(b, name)) for a, b in zip(predicted, expected, strict=True)]
        scores.means[f"{name}_right"] = np.array(equal)
    return scores


def _reg(ours: PairScores, pairs: PairedReports, models: TextModels) -> dict[str, Any]:
    """REG components of the predictions, the whole score where there is one, and the references' own score."""
    embed = models.encoder.mean_pooled if models.encoder is not None else None
    own = reg_score(pairs.references, pairs.references, entities=models.entities, embed=embed)
    means = {name: ours.means.get(f"reg_{name}") for name in WEIGHTS}
    missing = [name for name, values in means.items() if values is None]
    return {
        **{f"reg_{name}": None if values is None else float(values.mean()) for name, values in means.items()},
        "reg_score": None if missing else float(ours.means["reg_score"].mean()),
        "reg_status": reg_status(missing),
        "reg_ceiling": own["reg_ceiling"],
        "weights": WEIGHTS,
    }


def verbatim_and_distinct(pairs: PairedReports, train: Reports | None) -> dict[str, Any]:
    """How many different texts were written, and how many on either side are training texts word for word."""
    ours, theirs = ([" ".join(text.split()) for text in side] for side in (pairs.hypotheses, pairs.references))
    found: dict[str, Any] = {"distinct_predictions": len({*ours}), "distinct_references": len({*theirs})}
    if train is not None:
        seen = {" ".join(text.split()) for text in train.texts.values()} - {""}
        found["predictions_verbatim_from_training"] = sum(text in seen for text in ours) / len(ours)
        found["references_seen_in_training"] = sum(text in seen for text in theirs)
    return found
