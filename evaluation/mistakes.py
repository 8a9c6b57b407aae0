"""Mistakes of a report that would matter to a patient, the gravest first. Text metrics hardly see them."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from evaluation.field_scores import field_label, rank_of
from evaluation.fields import ReportFields
from evaluation.fields.grades import group_of
from evaluation.fields.terms import BENIGN, IN_SITU, MALIGNANT, NO_NEOPLASM, UNCERTAIN

HARMLESS = (NO_NEOPLASM, BENIGN)
PERCENTAGE_POINTS = 20  # a difference in a percentage of this many points counts as serious
# Kinds, the gravest first; a case is listed under each kind that it has.
KINDS = {
    "no report": "nothing was written",
    "malignancy missed": "the reference is malignant, the prediction harmless or silent",
    "malignancy invented": "the prediction is malignant, the reference harmless",
    "wrong organ": "another organ",
    "in situ or invasive": "one is in situ or non-invasive, the other invasive",
    "neoplasia missed": "the reference is in situ or uncertain, the prediction harmless or silent",
    "neoplasia invented": "the prediction is in situ or uncertain, the reference harmless",
    "grade off by two": "a grade is two steps or more away, or from one end of its scale to the other",
    "wrong Gleason": "another Gleason score or other patterns",
    "wrong tumor type": "both are malignant, of different kinds",
    "wrong invasion depth": "another depth, or none stated",
    "percentage off": f"tumor volume or share of a Gleason pattern off by {PERCENTAGE_POINTS} points or more",
    "wrong presence of muscle": "whether the specimen has muscle proper",
    "grade left out": "the reference has a grade, the prediction none",
    "contradiction": "the prediction contradicts itself",
}
GRADES = ("nottingham_grade", "grade_group", "differentiation", "who_grade", "dysplasia", "cin", "nuclear_grade",
          "neuroendocrine_grade")  # fmt: skip
TWO_STEP_SCALES = ("who_grade", "dysplasia")  # low and high: one step is the whole scale
SHARES = ("tumor_volume", "gleason_pattern_4", "gleason_pattern_5")


@dataclass(frozen=True)
class Mistake:
    """One mistake of one case: its kind (of `KINDS`), what the reference states and what the prediction does."""

    id: str
    kind: str
    reference: str
    predicted: str

    def as_dict(self) -> dict[str, str]:
        """Plain values for JSON."""
        return asdict(self)


def find_mistakes(
    ids: Sequence[str], texts: Sequence[str], predicted: Sequence[ReportFields], expected: Sequence[ReportFields]
) -> list[Mistake]:
    """All serious mistakes, sorted by gravity and then in the order of the cases. `texts` are the predictions."""
    found = []
    for key, text, ours, theirs in zip(ids, texts, predicted, expected, strict=True):
        if not text.strip():
            found.append(Mistake(key, "no report", _diagnosis(theirs), "nothing"))
            continue
        for check in _CHECKS:
            found += [Mistake(key, *mistake) for mistake in check(ours, theirs)]
    gravity = {kind: place for place, kind in enumerate(KINDS)}
    return sorted(found, key=lambda mistake: gravity[mistake.kind])


def count_mistakes(mistakes: Sequence[Mistake], num_cases: int) -> dict[str, Any]:
    """Cases with each kind of mistake, cases with any, and the share of cases with any."""
    cases = Counter(kind for _, kind in {(mistake.id, mistake.kind) for mistake in mistakes})
    affected = len({mistake.id for mistake in mistakes})
    return {
        "by_kind": {kind: cases[kind] for kind in KINDS if cases[kind]},
        "cases_affected": affected,
        "share_affected": affected / num_cases if num_cases else 0.0,
    }


Found = list[tuple[str, str, str]]


def _behavior(ours: ReportFields, theirs: ReportFields) -> Found:
    written, expected = ours.behavior, theirs.behavior
    kind = None
    if expected == MALIGNANT:
        kind = (
            "malignancy missed"
            if written in (*HARMLESS, None)
            else "in situ or invasive"
            if written == IN_SITU
            else None
        )
    elif written == MALIGNANT and expected in HARMLESS:
        kind = "malignancy invented"
    elif written == MALIGNANT and expected == IN_SITU:
        kind = "in situ or invasive"
    elif expected in (IN_SITU, UNCERTAIN) and written in (*HARMLESS, None):
        kind = "neoplasia missed"
    elif written in (IN_SITU, UNCERTAIN) and expected in HARMLESS:
        kind = "neoplasia invented"
    return [(kind, _diagnosis(theirs), _diagnosis(ours))] if kind else []


def _organ(ours: ReportFields, theirs: ReportFields) -> Found:
    if theirs.organ and ours.organ != theirs.organ:
        return [("wrong organ", theirs.organ, ours.organ or "none stated")]
    return []


def _grade(ours: ReportFields, theirs: ReportFields) -> Found:
    found: Found = []
    for name in GRADES:
        expected, written = getattr(theirs, name), getattr(ours, name)
        if expected is None:
            continue
        label = field_label(name)
        if written is None:
            if ours.behavior == theirs.behavior and ours.organ == theirs.organ:  # graver kinds list the others
                found.append(("grade left out", f"{label} {expected}", "none stated"))
            continue
        ranks = rank_of(name, expected), rank_of(name, written)
        if ranks[0] is None or ranks[1] is None:
            continue
        steps = abs(ranks[0] - ranks[1])
        if steps >= 2 or (steps and name in TWO_STEP_SCALES):
            found.append(("grade off by two", f"{label} {expected}", f"{label} {written}"))
    return found


def _gleason(ours: ReportFields, theirs: ReportFields) -> Found:
    expected, written = _gleason_words(theirs), _gleason_words(ours)
    return [("wrong Gleason", expected, written)] if expected and written and expected != written else []


def _gleason_words(fields: ReportFields) -> str:
    if fields.gleason_score is None:
        return ""
    patterns = f" ({fields.gleason_primary}+{fields.gleason_secondary})" if fields.gleason_primary else ""
    return f"Gleason {fields.gleason_score}{patterns}"


def _tumor_type(ours: ReportFields, theirs: ReportFields) -> Found:
    if ours.behavior == theirs.behavior == MALIGNANT and ours.diagnoses[:1] != theirs.diagnoses[:1]:
        if set(ours.diagnoses) != set(theirs.diagnoses):
            return [("wrong tumor type", _diagnosis(theirs), _diagnosis(ours))]
    return []


def _depth(ours: ReportFields, theirs: ReportFields) -> Found:
    if theirs.invasion_depth and ours.invasion_depth != theirs.invasion_depth and ours.behavior == theirs.behavior:
        return [("wrong invasion depth", theirs.invasion_depth, ours.invasion_depth or "none stated")]
    return []


def _percentage(ours: ReportFields, theirs: ReportFields) -> Found:
    found: Found = []
    for name in SHARES:
        expected, written = getattr(theirs, name), getattr(ours, name)
        if expected is not None and written is not None and abs(expected - written) >= PERCENTAGE_POINTS:
            label = field_label(name)
            found.append(("percentage off", f"{label} {expected:g} %", f"{label} {written:g} %"))
    return found


def _muscle(ours: ReportFields, theirs: ReportFields) -> Found:
    expected, written = theirs.muscle_proper, ours.muscle_proper
    if expected and written and expected != written:
        return [("wrong presence of muscle", f"muscle proper {expected}", f"muscle proper {written}")]
    return []


def _contradiction(ours: ReportFields, theirs: ReportFields) -> Found:
    return [("contradiction", "", words) for words in contradictions(ours)]


def contradictions(fields: ReportFields) -> list[str]:
    """What cannot be true together within one report: Gleason sums and groups, Nottingham totals, shares."""
    found = []
    score, first, second = fields.gleason_score, fields.gleason_primary, fields.gleason_secondary
    if score and first and second and first + second != score:
        found.append(f"Gleason {score} is not {first}+{second}")
    if score and fields.grade_group and (expected := group_of(score, first)) and expected != fields.grade_group:
        found.append(f"Gleason {score} is grade group {expected}, not {fields.grade_group}")
    parts = [fields.nottingham_tubules, fields.nottingham_nuclei, fields.nottingham_mitoses]
    if all(parts) and fields.nottingham_grade:
        total = sum(parts)
        if fields.nottingham_grade != 1 + (total > 5) + (total > 7):
            found.append(f"{'+'.join(map(str, parts))} is not Nottingham grade {fields.nottingham_grade}")
    found += [
        f"{name.replace('_', ' ')} of {share:g} %" for name in SHARES if (share := getattr(fields, name) or 0) > 100
    ]
    return found


def _diagnosis(fields: ReportFields) -> str:
    return ", ".join(fields.diagnoses) or "no diagnosis"


_CHECKS: tuple[Callable[[ReportFields, ReportFields], Found], ...] = (
    _behavior, _organ, _grade, _gleason, _tumor_type, _depth, _percentage, _muscle, _contradiction,
)  # fmt: skip
