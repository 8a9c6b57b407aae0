"""Survival: does the risk that a report states, or a model gives, order patients as their follow-up does?"""

import csv
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from csv_separator import separator_of
from evaluation.fields import ReportFields
from evaluation.report_files import finite

RISK_WORDS = {
    "very low": 0,
    "low": 1,
    "favorable": 1,
    "intermediate": 2,
    "moderate": 2,
    "high": 3,
    "poor": 3,
    "very high": 4,
}
_WORDS = "|".join(sorted(RISK_WORDS, key=len, reverse=True))
_NUMERIC_RISK = re.compile(r"\brisk(?: score| index)?(?: is| of|\s*[:=])?\s*(-?\d+(?:\.\d+)?)(?![\d%]*\s*%)", re.I)
_STATED_RISK = re.compile(
    rf"\b({_WORDS})[- ]risk\b|\brisk(?: group| category| class)?(?: is|\s*[:=])?\s*({_WORDS})\b"
    rf"|prognosis\s*[:=]?\s*({_WORDS})\b",
    re.I,
)
# Grades that stand for a risk where a report states none, in the order in which they are looked for.
GRADE_RISKS = ("grade_group", "nottingham_grade", "neuroendocrine_grade", "cin")
WORD_GRADE_RISKS = {
    "differentiation": ("well", "moderate", "poor", "undifferentiated"),
    "who_grade": ("low", "high"),
    "nuclear_grade": ("low", "intermediate", "high"),
}
MOST_GROUPS = 5  # values up to which a risk is its own grouping; above, patients are halved at the median


@dataclass(frozen=True)
class FollowUp:
    """Follow-up of one case: time in the unit of the file, and whether the event was seen (else censored)."""

    time: float
    event: bool


def read_follow_up(records: Mapping[str, Mapping[str, Any]], time_field: str, event_field: str) -> dict[str, FollowUp]:
    """Follow-up of the records that carry both fields, by id; a negative or unreadable time is left out."""
    found = {}
    for key, record in records.items():
        time, event = finite(record.get(time_field)), as_event(record.get(event_field))
        if time is not None and time >= 0 and event is not None:
            found[key] = FollowUp(time, event)
    return found


def as_event(value: Any) -> bool | None:
    """Read an event from 0, 1, true, false or the words that registries use; None for anything else."""
    words = {"1": True, "true": True, "dead": True, "deceased": True, "yes": True, "event": True, "relapse": True}
    words |= {"0": False, "false": False, "alive": False, "living": False, "no": False, "censored": False}
    text = str(value).strip().lower()
    return words.get(text.removesuffix(".0"))


def stated_risk(text: str) -> float | None:
    """Risk that a report states: its number ("risk score: 0.7"), or the rank of its word ("high risk"), else None."""
    if found := _NUMERIC_RISK.search(text):
        return float(found.group(1))
    if found := _STATED_RISK.search(text):
        return float(RISK_WORDS[next(part for part in found.groups() if part).lower()])
    return None


def graded_risk(fields: ReportFields) -> float | None:
    """Risk by the grade that a report states, or None."""
    for name in GRADE_RISKS:
        if (grade := getattr(fields, name)) is not None:
            return float(grade)
    for name, order in WORD_GRADE_RISKS.items():
        if (word := getattr(fields, name)) in order:
            return float(order.index(word) + 1)
    return None


def read_risks(path: Path) -> dict[str, float]:
    """Read a risk for each id, from a CSV with columns `id` and `risk`, or JSON `{"id": risk}` or `[{"id", "risk"}]`.

    Raises FileNotFoundError, or ValueError naming the file and the row.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--risks {path}: no such file")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            is_table = path.suffix.lower() == ".csv"
            rows: Any = list(csv.DictReader(file, delimiter=separator_of(file))) if is_table else json.load(file)
    except ValueError as error:
        raise ValueError(f"--risks {path}: not JSON ({error}); give a CSV with id and risk, or JSON") from None
    if isinstance(rows, dict):
        rows = [{"id": key, "risk": value} for key, value in rows.items()]
    risks = {}
    for number, row in enumerate(rows):
        risk = finite(row.get("risk")) if isinstance(row, dict) and "id" in row else None
        if risk is None:
            raise ValueError(f"--risks {path}: row {number} has no id with a finite risk: {row!r:.80}")
        risks[str(row["id"])] = risk
    return risks


def choose_risks(
    ids: Sequence[str], texts: Sequence[str], fields: Sequence[ReportFields], given: Mapping[str, float] | None
) -> tuple[dict[str, float], str]:
    """Risk of each case that has one, and where it came from.

    `given` (of `--risks`, or a `risk` in the predictions) goes before what reports state, that before their grades; the
    three are never mixed.
    """
    stated = {key: risk for key, text in zip(ids, texts, strict=True) if (risk := stated_risk(text)) is not None}
    graded = {key: risk for key, one in zip(ids, fields, strict=True) if (risk := graded_risk(one)) is not None}
    sources = (
        (given or {}, "given with the predictions"),
        (stated, "stated in the reports"),
        (graded, "grade in the reports"),
    )
    return next(
        (({key: risks[key] for key in ids if key in risks}, name) for risks, name in sources if risks), ({}, "none")
    )


def groups_of(risks: Sequence[float]) -> list[str]:
    """Group of each risk: its own value where there are up to five, else below or above the median."""
    values = sorted({*risks})
    if len(values) <= MOST_GROUPS:
        return [f"{risk:g}" for risk in risks]
    median = float(np.median(risks))
    return [f"above {median:.3g}" if risk > median else f"up to {median:.3g}" for risk in risks]


def survival_scores(follow_up: Mapping[str, FollowUp], risks: Mapping[str, float], source: str) -> dict[str, Any]:
    """Concordance index (Harrell 1982) and log-rank test over groups of risk, with lifelines.

    Returns `n`, `events`, `without_risk`, `risk_source`, `concordance_index` (0.5 is chance; higher risk should mean
    earlier events), `log_rank_p`, `log_rank_statistic`, and `groups` with n, events and median survival. What is
    undefined (no events, one group) is None.
    """
    from lifelines import KaplanMeierFitter
    from lifelines.statistics import multivariate_logrank_test
    from lifelines.utils import concordance_index

    ids = [key for key in follow_up if key in risks]
    times = np.array([follow_up[key].time for key in ids])
    events = np.array([follow_up[key].event for key in ids], dtype=bool)
    values = [risks[key] for key in ids]
    scores: dict[str, Any] = {"n": len(ids), "events": int(events.sum()), "without_risk": len(follow_up) - len(ids)}
    scores |= {"risk_source": source, "concordance_index": None, "log_rank_p": None, "log_rank_statistic": None}
    scores["groups"] = {}
    try:
        scores["concordance_index"] = float(concordance_index(times, -np.array(values), events)) if ids else None
    except ZeroDivisionError:  # no two cases can be ordered
        pass
    names = np.array(groups_of(values)) if ids else np.array([])
    for name in sorted({*names}):
        member = names == name
        median = KaplanMeierFitter().fit(times[member], events[member]).median_survival_time_
        scores["groups"][str(name)] = {
            "n": int(member.sum()),
            "events": int(events[member].sum()),
            "median": float(median) if np.isfinite(median) else None,
        }
    if len(scores["groups"]) > 1 and events.any():
        test = multivariate_logrank_test(times, names, events)
        scores |= {"log_rank_p": float(test.p_value), "log_rank_statistic": float(test.test_statistic)}
    return scores
