"""Pictures of an evaluation, each a matplotlib figure."""

import io
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart by color-blind readers.
COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#6b6b6b", "#b8a000")
METRIC_NAMES = {
    **{f"bleu_{order}": f"BLEU-{order} (pycocoevalcap)" for order in range(1, 5)},
    "sacre_bleu": "BLEU (sacrebleu)",
    "rouge_1_f1": "ROUGE-1 F1 (rouge-score)",
    "rouge_2_f1": "ROUGE-2 F1 (rouge-score)",
    "rouge_l_f1": "ROUGE-L F1 (rouge-score)",
    "rouge_l": "ROUGE-L (pycocoevalcap)",
    "meteor": "METEOR",
    "cider_d": "CIDEr-D",
    "chrf": "chrF2 (sacrebleu)",
    "levenshtein_ratio": "Levenshtein ratio",
    "embedding_cosine": "embedding cosine",
    "bert_score_f1": "BERTScore F1",
    "exact_match": "right word for word",
    "reg_rouge": "ROUGE of the REG score",
    "reg_bleu": "BLEU of the REG score",
}
INK, QUIET, GRID = "#1c2128", "#656d78", "#dfe3e8"


def metric_name(name: str) -> str:
    """Words for a metric's name in metrics.json."""
    return METRIC_NAMES.get(name, name.replace("_", " "))


def _axes(width: float, height: float, **settings: Any) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    _style(axes)
    axes.set(**settings)
    return figure, axes


def _style(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRID)
    axes.tick_params(which="both", colors=QUIET, labelsize=8.5, length=3)
    axes.xaxis.label.set(color=INK, fontsize=9)
    axes.yaxis.label.set(color=INK, fontsize=9)
    axes.title.set(color=INK, fontsize=10)


def picture(figure: Figure, form: str = "svg") -> bytes:
    """Bytes of a figure, "svg" or "png", the same for the same figure."""
    buffer = io.BytesIO()
    metadata = {"Date": None} if form == "svg" else {}
    with rc_context({"svg.hashsalt": "slidescribe"}):  # else the names of an SVG's parts are drawn anew each time
        figure.savefig(buffer, format=form, dpi=140, metadata=metadata)
    return buffer.getvalue()


def confusion_figure(title: str, rows: Sequence[str], columns: Sequence[str], counts: np.ndarray) -> Figure:
    """Confusion of one field: rows are references, columns predictions, shade is the share of the row."""
    margin = 0.06 * min(max(len(label) for label in (*rows, *columns)), 40)
    cell = 0.42 if len(columns) > 4 else 0.6
    figure = Figure(
        figsize=(cell * len(columns) + 0.9 + 1.2 * margin, cell * len(rows) + 1.5 + margin), layout="constrained"
    )
    axes = figure.add_subplot()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1.25)
    slanted = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if max(map(len, columns)) > 3 else {}
    for labels, put, more in ((columns, axes.set_xticks, slanted), (rows, axes.set_yticks, {})):
        shown = [label if len(label) <= 40 else label[:39] + "…" for label in labels]
        put(range(len(labels)), shown, fontsize=8, color=INK, **more)
    axes.set_xlabel("predicted", fontsize=9, color=INK)
    axes.set_ylabel("reference", fontsize=9, color=INK)
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for row, column in zip(*np.nonzero(counts), strict=True):
        dark = shares[row, column] > 0.6
        axes.text(
            column, row, counts[row, column], ha="center", va="center", fontsize=8, color="white" if dark else INK
        )
    return figure


def distribution_figure(metrics: Mapping[str, np.ndarray]) -> Figure:
    """Histogram of each metric over reports, with its mean."""
    columns = min(3, len(metrics))
    rows = -(-len(metrics) // columns)
    figure = Figure(figsize=(3.3 * columns, 2.0 * rows), layout="constrained")
    for place, (name, values) in enumerate(metrics.items()):
        axes = figure.add_subplot(rows, columns, place + 1)
        _style(axes)
        top = max(1.0, float(values.max()))
        axes.hist(values, bins=np.linspace(min(0.0, float(values.min())), top, 26), color=COLORS[0], alpha=0.85)
        axes.axvline(values.mean(), color=COLORS[4], lw=1.4)
        axes.set_title(f"{metric_name(name)}, mean {values.mean():.3f}", fontsize=9, color=INK, loc="left")
        if place % columns == 0:
            axes.set_ylabel("reports", fontsize=8.5, color=QUIET)
    return figure


def calibration_figure(calibration: Mapping[str, Any]) -> Figure:
    """Share of reports without a serious mistake against the model's confidence, with the bins' 95 % intervals."""
    figure, axes = _axes(
        3.8, 3.4, xlabel="confidence", ylabel="reports without a serious mistake", xlim=(0, 1), ylim=(0, 1)
    )
    axes.plot([0, 1], [0, 1], color=GRID, lw=1.2, zorder=0)
    shares = np.array([row["without_serious_mistake"] for row in calibration["bins"]])
    sizes = np.array([row["n"] for row in calibration["bins"]])
    low, high = wilson_interval(shares, sizes)
    xs = [row["confidence"] for row in calibration["bins"]]
    errors = np.maximum([shares - low, high - shares], 0)
    axes.errorbar(xs, shares, yerr=errors, fmt="o-", ms=4, lw=1.2, elinewidth=0.8, color=COLORS[0])
    axes.set_title(
        f"calibration error {calibration['expected_calibration_error']:.3f}", fontsize=9.5, loc="left", color=INK
    )
    return figure


def wilson_interval(shares: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of a share (Wilson 1927)."""
    z = 1.96
    middle = (shares + z**2 / (2 * sizes)) / (1 + z**2 / sizes)
    half = z * np.sqrt(shares * (1 - shares) / sizes + z**2 / (4 * sizes**2)) / (1 + z**2 / sizes)
    return middle - half, middle + half


def survival_figure(times: np.ndarray, events: np.ndarray, groups: Sequence[str], caption: str) -> Figure:
    """Kaplan-Meier curve of each group with its 95 % band, censored cases as ticks, and numbers at risk below."""
    from lifelines import KaplanMeierFitter

    names = sorted({*groups})
    figure = Figure(figsize=(5.6, 3.4 + 0.2 * len(names)), layout="constrained")
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=[8, 0.6 + 0.6 * len(names)])
    _style(axes)
    member = np.array(groups)
    for name, color in zip(names, COLORS * len(names), strict=False):
        kept = member == name
        curve = KaplanMeierFitter().fit(times[kept], events[kept])
        steps = curve.survival_function_.index.to_numpy()
        alive = curve.survival_function_.to_numpy().ravel()
        band = curve.confidence_interval_.to_numpy()
        axes.step(steps, alive, where="post", color=color, lw=1.6, label=f"{name} (n = {kept.sum()})")
        axes.fill_between(steps, band[:, 0], band[:, 1], step="post", color=color, alpha=0.12, lw=0)
        censored = times[kept & ~events]
        axes.plot(censored, curve.predict(censored) if len(censored) else [], "|", color=color, ms=6)
    axes.set(ylim=(0, 1.02), xlim=(0, None), ylabel="share without the event")
    axes.legend(frameon=False, fontsize=8.5)
    axes.set_title(caption, fontsize=9.5, loc="left", color=INK)
    ticks = [tick for tick in axes.get_xticks() if 0 <= tick <= times.max()]
    for row, name in enumerate(names):
        for tick in ticks:
            at_risk = int((times[member == name] >= tick).sum())
            below.text(tick, -row, at_risk, ha="center", va="center", fontsize=8, color=COLORS[row % len(COLORS)])
    below.set(ylim=(-len(names) + 0.4, 0.6), yticks=[], xlabel="time")
    below.set_ylabel("at risk", fontsize=8.5, color=QUIET, rotation=0, ha="right", va="center")
    below.spines[:].set_visible(False)
    below.tick_params(colors=QUIET, labelsize=8.5)
    return figure


def curves_figure(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Training loss (thin), validation loss (dots) and learning rate of several runs over one another."""
    from run_log import loss_name

    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    losses, rates = figure.subplots(1, 2, width_ratios=[3, 2])
    for (name, lines), color in zip(runs.items(), COLORS * len(runs), strict=False):
        steps = [line for line in lines if "loss" in line]
        evaluations = [line for line in lines if "val_loss" in line]
        losses.plot([s["step"] for s in steps], [s["loss"] for s in steps], lw=0.8, alpha=0.55, color=color)
        losses.plot([], [], color=color, lw=2, label=name)
        if evaluations:
            losses.plot(
                [e["step"] for e in evaluations], [e["val_loss"] for e in evaluations], "o-", ms=3, lw=1.4, color=color
            )
        rates.plot([s["step"] for s in steps], [s["lr"] for s in steps], color=color, lw=1.2)
    losses.set(xlabel="step", ylabel=loss_name(chain.from_iterable(runs.values())), yscale="log")
    losses.set_title("training (thin) and validation (dots)", loc="left", fontsize=9.5, color=INK)
    low, high = losses.get_ylim()
    losses.yaxis.set_major_formatter("{x:g}")
    losses.yaxis.set_minor_formatter("{x:.2g}" if high < 10 * low else "")  # within a decade only they say anything
    rates.set(xlabel="step", ylabel="learning rate")
    losses.legend(frameon=False, fontsize=8.5)
    for axes in (losses, rates):
        _style(axes)
        axes.grid(color=GRID, lw=0.5)
    return figure


def comparison_figure(
    results: Mapping[str, Mapping[str, Any]],
    names: Sequence[str],
    costs: Mapping[str, Mapping[str, float | None]] | None = None,
) -> Figure:
    """Metrics of several results side by side with their 95 % intervals, and each one's best baseline as a tick.

    Args:
        results: metrics.json of each, by the name that its row has; the first is on top.
        names: metrics, a panel each.
        costs: by its heading, a number for each result, drawn as a bar; None where it is not known.
    """
    costs = costs or {}
    widths = [2.5] * len(names) + [1.9] * len(costs)
    figure = Figure(figsize=(sum(widths) + 0.6, 1.0 + 0.46 * len(results)), layout="constrained")
    all_axes = np.atleast_1d(figure.subplots(1, len(widths), sharey=True, width_ratios=widths))
    places = np.arange(len(results))[::-1]
    colors = (COLORS * len(results))[: len(results)]
    for axes, name in zip(all_axes[: len(names)], names, strict=True):
        for place, metrics, color in zip(places, results.values(), colors, strict=True):
            _draw_score(axes, place, metrics, name, color)
        axes.grid(axis="x", color=GRID, lw=0.5)
        axes.margins(x=0.12)
    for axes, (_, numbers) in zip(all_axes[len(names) :], costs.items(), strict=True):
        _draw_bars(axes, places, [numbers.get(row) for row in results], colors)
    for axes, heading in zip(all_axes, (*names, *costs), strict=True):
        _style(axes)
        axes.set_axisbelow(True)
        axes.tick_params(axis="y", length=0)
        axes.set_title(metric_name(heading), loc="left", fontsize=9.5, color=INK)
        axes.set_ylim(-0.6, len(results) - 0.3)
    all_axes[0].set_yticks(places, list(results), fontsize=9, color=INK)
    all_axes[0].tick_params(axis="y", colors=INK)
    figure.supxlabel("dot and line: score and 95 % interval; grey tick: best baseline", fontsize=8, color=QUIET)
    return figure


def _draw_score(axes: Any, place: float, metrics: Mapping[str, Any], name: str, color: str) -> None:
    """A score as a dot with its number above, its interval as a line, its best baseline as a tick."""
    score = metrics[name]
    low, high = metrics.get("intervals_95", {}).get(name) or (score, score)
    axes.plot([low, high], [place, place], color=color, lw=2, solid_capstyle="round")
    axes.plot(score, place, "o", color=color, ms=6)
    axes.text(score, place + 0.2, f"{score:.2f}", ha="center", va="bottom", fontsize=7.5, color=INK)
    baselines = [row[name] for row in (metrics.get("baselines") or {}).values() if name in row]
    if baselines:
        axes.plot(max(baselines), place, "|", color=QUIET, ms=13, mew=1.6)


def _draw_bars(axes: Any, places: np.ndarray, numbers: Sequence[float | None], colors: Sequence[str]) -> None:
    """Numbers as bars with the number behind each, from zero."""
    axes.barh(places, [number or 0 for number in numbers], color=colors, height=0.42, alpha=0.85)
    for place, number in zip(places, numbers, strict=True):
        shown = "not known" if number is None else f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
        axes.text(number or 0, place, f" {shown}", va="center", fontsize=8, color=INK)
    axes.set_xlim(0, 1.35 * max((number or 0 for number in numbers), default=0) or 1)
    axes.set_xticks([])


def mistakes_figure(counts: Mapping[str, int], num_cases: int) -> Figure:
    """Share of cases with each kind of serious mistake, the gravest on top."""
    figure, axes = _axes(6.4, 0.7 + 0.27 * max(len(counts), 1), xlabel="share of reports, %")
    places = np.arange(len(counts))[::-1]
    shades = colormaps["Reds"](np.linspace(0.85, 0.4, max(len(counts), 1)))
    axes.barh(places, [100 * count / num_cases for count in counts.values()], color=shades, height=0.7)
    axes.set_yticks(places, list(counts), fontsize=8.5, color=INK)
    for place, count in zip(places, counts.values(), strict=True):
        axes.text(100 * count / num_cases, place, f" {count}", va="center", fontsize=8, color=QUIET)
    return figure
