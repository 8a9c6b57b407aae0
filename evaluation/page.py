"""report.html: one file with everything in it, the serious mistakes first."""

import base64
import difflib
import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from jsonargparse import Namespace

from command_line import counted
from evaluation.clinical import Clinical
from evaluation.field_scores import field_label
from evaluation.figures import metric_name
from evaluation.mistakes import KINDS, Mistake
from evaluation.report_files import WHAT_WAS_DONE, PairedReports
from evaluation.text_metrics import PairScores
from slide_features import atomic_path

TEMPLATE = Path(__file__).with_name("report_page.html")
MOST_OF_A_KIND = 12  # mistakes listed on the page; mistakes.json has them all
THUMBNAIL_PX = 380
COLUMNS = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "sacre_bleu", "rouge_1_f1", "rouge_2_f1", "rouge_l_f1", "rouge_l",
           "meteor", "cider_d", "chrf", "levenshtein_ratio", "embedding_cosine", "bert_score_f1",
           "exact_match")  # fmt: skip
ROW_NAMES = {
    "predictions": "predictions",
    "constant": "most frequent training report",
    "organ_modal": "most frequent report of the organ",
    "retrieval": "report of the nearest training slide",
    "shuffled_images": "images shuffled",
}


def write_page(
    path: Path,
    args: Namespace,
    pairs: PairedReports,
    metrics: Mapping[str, Any],
    scores: PairScores,
    clinical: Clinical,
    pictures: Mapping[str, bytes],
) -> None:
    """Write the page, whole or not at all. It needs no other file and no network."""
    sections = {
        "Serious mistakes": _mistakes(pairs, metrics, clinical, pictures),
        "Scores": _scores(metrics),
        "Fields": _fields(metrics),
        "Pictures": _pictures(pictures),
        "Cases": _gallery(args, pairs, scores, clinical),
    }
    title = f"Evaluation of {args.predictions.name}"
    page = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(title),
        subtitle=escape(
            f"{counted(metrics['n'], 'report')} of {counted(metrics['num_patients'], 'patient')}, "
            f"against {args.references.name}"
        ),
        links="".join(f'<a href="#{_anchor(name)}">{escape(name)}</a>' for name in sections),
        figures=_figures(metrics),
        sections="\n".join(f'<h2 id="{_anchor(name)}">{escape(name)}</h2>\n{body}' for name, body in sections.items()),
    )
    with atomic_path(path) as partial:
        partial.write_text(page, encoding="utf-8")


def marked_differences(reference: str, prediction: str) -> tuple[str, str]:
    """HTML of both texts: words of the reference that are missing in <del>, words that are wrong in <ins>."""
    ours, theirs = (re.findall(r"\S+\s*", text.strip()) for text in (prediction, reference))
    words = [[word.strip() for word in side] for side in (theirs, ours)]
    left, right = [], []
    for kind, a0, a1, b0, b1 in difflib.SequenceMatcher(None, *words, autojunk=False).get_opcodes():
        left.append(_marked("".join(theirs[a0:a1]), "" if kind == "equal" else "del"))
        right.append(_marked("".join(ours[b0:b1]), "" if kind == "equal" else "ins"))
    return "".join(left), "".join(right)


def _marked(text: str, tag: str) -> str:
    words = text.rstrip()
    return f"<{tag}>{escape(words)}</{tag}>{text[len(words) :]}" if tag and words else escape(text)


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


def _figures(metrics: Mapping[str, Any]) -> str:
    mistakes, reg = metrics["mistakes"], metrics["reg"]
    whole = reg["reg_score"] is not None
    boxes = [
        ("With a serious mistake", f"{mistakes['share_affected']:.1%}",
         f"{mistakes['cases_affected']} of {counted(metrics['n'], 'report')}", "bad"),
        *((label, f"{metrics[name]:.3f}", _interval(metrics, name), "") for label, name in
          (("ROUGE-L", "rouge_l"), ("BLEU-4", "bleu_4"), ("METEOR", "meteor"), ("Right word for word", "exact_match"))),
        ("REG score", f"{reg['reg_score']:.3f}" if whole else "partial",
         f"references: {reg['reg_ceiling']['ceiling']:.3f}" if whole else reg["reg_status"].removeprefix("partial: "),
         ""),
        ("Different texts", str(metrics["distinct_predictions"]), f"references: {metrics['distinct_references']}", ""),
    ]  # fmt: skip
    if "predictions_verbatim_from_training" in metrics:
        seen = metrics["references_seen_in_training"] / metrics["n"]
        share = metrics["predictions_verbatim_from_training"]
        boxes.append(("Copied from training", f"{share:.1%}", f"references: {seen:.1%}", ""))
    if (index := (metrics.get("survival") or {}).get("concordance_index")) is not None:
        boxes.append(("Concordance index", f"{index:.3f}", f"{metrics['survival']['events']} events", ""))
    return "".join(
        f'<div class="{kind}"><dt>{escape(label)}</dt><dd>{escape(value)}<small>{escape(small)}</small></dd></div>'
        for label, value, small, kind in boxes
    )


def _interval(metrics: Mapping[str, Any], name: str) -> str:
    low_high = metrics["intervals_95"].get(name)
    return f"{low_high[0]:.3f} to {low_high[1]:.3f}" if low_high else ""


def _mistakes(
    pairs: PairedReports, metrics: Mapping[str, Any], clinical: Clinical, pictures: Mapping[str, bytes]
) -> str:
    if not clinical.mistakes:
        return '<p><span class="badge fine">none found</span></p>'
    texts = dict(zip(pairs.ids, zip(pairs.references, pairs.hypotheses, strict=True), strict=True))
    by_kind: dict[str, list[Mistake]] = {}
    for mistake in clinical.mistakes:
        by_kind.setdefault(mistake.kind, []).append(mistake)
    shown = [mistake for kind in by_kind.values() for mistake in kind[:MOST_OF_A_KIND]]
    rows = "".join(_mistake_row(mistake, *texts[mistake.id]) for mistake in shown)
    more = len(clinical.mistakes) - len(shown)
    caption = f"Up to {MOST_OF_A_KIND} of each kind; {more} more are in mistakes.json." if more else "All of them."
    return (
        f"<figure>{_image(pictures['mistakes'], 'share of reports with each kind of mistake')}</figure><br>"
        '<div class="card mistakes"><div class="line head"><span>case</span><span>kind</span>'
        "<span>reference states</span>"
        f'<span>prediction states</span></div>{rows}<p class="note">{caption} Open a line to read both '
        f"reports.</p></div>"
    )


def _mistake_row(mistake: Mistake, reference: str, prediction: str) -> str:
    return (
        f'<details><summary class="line"><span>{escape(mistake.id)}</span>'
        f'<span><span class="badge" title="{escape(KINDS[mistake.kind])}">{escape(mistake.kind)}</span></span>'
        f"<span>{escape(mistake.reference)}</span><span>{escape(mistake.predicted)}</span></summary>"
        f"{_texts(reference, prediction)}</details>"
    )


def _texts(reference: str, prediction: str) -> str:
    left, right = marked_differences(reference, prediction)
    return (
        f'<div class="texts"><div><h4>reference</h4><div class="text">{left}</div></div>'
        f'<div><h4>prediction</h4><div class="text">{right or "<em>empty</em>"}</div></div></div>'
    )


def _scores(metrics: Mapping[str, Any]) -> str:
    rows = {"predictions": metrics, **(metrics["baselines"] or {})}
    if metrics["shuffled_images"] and "shuffled_images" not in rows:
        rows["shuffled_images"] = metrics["shuffled_images"]
    head = "".join(f"<th>{escape(ROW_NAMES[name])}</th>" for name in rows)
    body = ""
    for column in (name for name in COLUMNS if name in metrics):
        spread = f"<small>{_interval(metrics, column)}</small>"
        cells = "".join(
            f'<td class="{name}">{row[column]:.3f}{spread if name == "predictions" else ""}</td>'
            for name, row in rows.items()
        )
        body += f"<tr><th>{escape(metric_name(column))}</th>{cells}</tr>"
    notes = [
        "Small figures: 95 % bootstrap interval over patients.",
        f"METEOR: {metrics['meteor_variant']}.",
        "CIDEr-D is from 0 to 10, everything else from 0 to 1.",
        f"REG score: {metrics['reg']['reg_status']}.",
    ]
    problems = [f"{count} {WHAT_WAS_DONE[kind]}." for kind, count in metrics["input_problems"].items() if count]
    if "baselines_missing_because" in metrics:
        problems.append(f"No baselines: {metrics['baselines_missing_because']}.")
    warning = f'<p><span class="badge">input</span> {escape(" ".join(problems))}</p>' if problems else ""
    return (
        f'{warning}<div class="card scroll"><table><thead><tr><th></th>{head}</tr></thead><tbody>{body}'
        f"</tbody></table></div>"
        f'<p class="note">{escape(" ".join(notes))}</p>{_reg(metrics)}'
    )


def _reg(metrics: Mapping[str, Any]) -> str:
    reg = metrics["reg"]
    cells = "".join(
        f"<td>{'not computed' if reg[f'reg_{name}'] is None else format(reg[f'reg_{name}'], '.3f')}</td>"
        for name in reg["weights"]
    )
    head = "".join(f"<th>{name.upper()} (weight {weight:g})</th>" for name, weight in reg["weights"].items())
    ceiling, weight = reg["reg_ceiling"]["ceiling"], reg["reg_ceiling"]["weight_computed"]
    total = "partial" if reg["reg_score"] is None else f"{reg['reg_score']:.3f}"
    caption = (
        f"{reg['reg_status']}. These references would themselves get {ceiling:.3f} of the weight {weight:g} computed."
    )
    return (
        f'<div class="card scroll"><table><caption>{escape(caption)}</caption><thead><tr><th>REG score'
        f"</th>{head}</tr></thead>"
        f'<tbody><tr class="ours"><th>{total}</th>{cells}</tr></tbody></table></div>'
    )


def _fields(metrics: Mapping[str, Any]) -> str:
    columns = {"n": "references", "accuracy": "accuracy", "macro_f1": "macro F1", "weighted_kappa": "weighted kappa",
               "mean_absolute_error": "mean error, points", "left_out": "left out", "invented": "invented"}  # fmt: skip
    head = "".join(f"<th>{label}</th>" for label in columns.values())
    body = "".join(
        f"<tr><th>{escape(field_label(name))}</th>{''.join(_field_cell(row, key) for key in columns)}</tr>"
        for name, row in metrics["fields"].items()
    )
    caption = (
        "Accuracy: among references that state the field. Left out: stated there, not predicted; invented: the reverse."
    )
    return (
        f'<div class="card scroll"><table><caption>{caption}</caption><thead><tr><th>field</th>{head}'
        f"</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _field_cell(row: Mapping[str, Any], key: str) -> str:
    low_high = row.get("accuracy_95") if key == "accuracy" else None
    return (
        f"<td>{_cell(row.get(key))}{f'<small>{low_high[0]:.3f} to {low_high[1]:.3f}</small>' if low_high else ''}</td>"
    )


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def _pictures(pictures: Mapping[str, bytes]) -> str:
    shown = {name: data for name, data in pictures.items() if name != "mistakes"}
    spans = {"distributions": "wide", "confusion_diagnoses": "wide", "survival": "double", "confusion_organ": "double"}
    return '<div class="pictures">' + "".join(
        f'<figure class="{spans.get(name, "")}">{_image(data, name.replace("_", " "))}</figure>'
        for name, data in shown.items()
    ) + "</div>"  # fmt: skip


def _image(svg: bytes, words: str) -> str:
    return f'<img alt="{escape(words)}" src="data:image/svg+xml;base64,{base64.b64encode(svg).decode()}">'


def _gallery(args: Namespace, pairs: PairedReports, scores: PairScores, clinical: Clinical) -> str:
    kinds: dict[str, list[str]] = {}
    for mistake in clinical.mistakes:
        kinds.setdefault(mistake.id, []).append(mistake.kind)
    gravity = {kind: place for place, kind in enumerate(KINDS)}
    order = sorted(range(len(pairs.ids)), key=lambda i: _gravest(kinds.get(pairs.ids[i], []), gravity))
    half = args.gallery - args.gallery // 2
    wrong = [i for i in order if pairs.ids[i] in kinds]
    right = [i for i in order if pairs.ids[i] not in kinds]
    chosen = wrong[: max(half, args.gallery - len(right))] + right[: max(args.gallery // 2, args.gallery - len(wrong))]
    cards = []
    for place in chosen:
        key = pairs.ids[place]
        shots = [
            *_thumbnail("slide", args.stage0_dir and args.stage0_dir / "thumbnails", key),
            *_thumbnail("evidence", args.evidence_dir, key),
        ]
        badges = "".join(f'<span class="badge">{escape(kind)}</span>' for kind in dict.fromkeys(kinds.get(key, [])))
        badges = badges or '<span class="badge fine">no serious mistake</span>'
        rouge = f'<span class="quiet">ROUGE-L {scores.means["rouge_l"][place]:.3f}</span>'
        images = f'<div class="shots">{"".join(shots)}</div>' if shots else ""
        cards.append(
            f'<article class="card case {("bare", "", "two")[len(shots)]}">{images}<div><div class="head">'
            f"<h3>{escape(key)}</h3>{badges}{rouge}</div>"
            f"{_texts(pairs.references[place], pairs.hypotheses[place])}</div></article>"
        )
    legend = (
        "<p>Gravest mistakes first. Words of the reference that are missing are <del>green</del>, "
        "words that it does not have <ins>red</ins>.</p>"
    )
    return f'{legend}<div class="cases">{"".join(cards)}</div>'


def _gravest(kinds: Sequence[str], gravity: Mapping[str, int]) -> int:
    return min((gravity[kind] for kind in kinds), default=len(gravity))


def _thumbnail(what: str, folder: Path | None, key: str) -> list[str]:
    """The picture of a slide in a folder as HTML, reduced in size; nothing where there is none or it does not open."""
    if not folder:
        return []
    from PIL import Image

    from slide_reports.record import slide_id_of

    slide_id = slide_id_of(key)
    for name in (f"{slide_id}.jpg", f"{slide_id}.jpeg", f"{slide_id}.png", f"{slide_id}/report.png"):
        path = folder / name
        if not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
            continue
        try:
            with Image.open(path) as image:
                small = image.convert("RGB")
                small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
        except (OSError, ValueError):
            return []
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=82)
        data = base64.b64encode(buffer.getvalue()).decode()
        image = f'<img alt="{what} of {escape(key)}" src="data:image/jpeg;base64,{data}">'
        legend = ": orange speaks for, blue against" if what == "evidence" else ""
        return [f"<div>{image}<small>{what}{legend}</small></div>"]
    return []
