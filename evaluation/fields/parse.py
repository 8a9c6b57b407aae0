"""From the text of a report to its fields."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields

from evaluation.fields import grades
from evaluation.fields.hinted import Hinted
from evaluation.fields.terms import (
    BEHAVIORS,
    DIAGNOSIS_STEM,
    MALT_LYMPHOMA,
    NEGATION,
    NO_TUMOR,
    NOT_OF_THE_NAME,
    ORGAN_IN_TEXT,
    PROCEDURE_STEM,
    SYNONYMS,
    WORDS_BEFORE,
    behavior_of,
    canonical_organ,
    is_organ,
    mend,
)
from evaluation.parallel import map_in_processes, slices

NO_TUMOR_NAME = "no tumor"
TEXTS_AT_A_TIME = 2500


@dataclass
class ReportFields:
    """What a report states. None (or an empty tuple) means that it says nothing about it.

    Grades are integers, percentages floats from 0 to 100, the rest lower-case words. Of several findings, a field is
    that of the first that states it; `behavior` is the worst, one of `BEHAVIORS`.
    """

    organ: str | None = None
    procedure: str | None = None
    diagnoses: tuple[str, ...] = ()
    behavior: str | None = None
    no_tumor: bool = False
    nottingham_grade: int | None = None
    nottingham_total: int | None = None
    nottingham_tubules: int | None = None
    nottingham_nuclei: int | None = None
    nottingham_mitoses: int | None = None
    gleason_score: int | None = None
    gleason_primary: int | None = None
    gleason_secondary: int | None = None
    grade_group: int | None = None
    gleason_pattern_4: float | None = None
    gleason_pattern_5: float | None = None
    tumor_volume: float | None = None
    who_grade: str | None = None
    differentiation: str | None = None
    dysplasia: str | None = None
    cin: int | None = None
    neuroendocrine_grade: int | None = None
    nuclear_grade: str | None = None
    growth_pattern: tuple[str, ...] | None = None
    necrosis: str | None = None
    invasion_depth: str | None = None
    muscle_proper: str | None = None
    features: tuple[str, ...] = ()
    favored: str | None = None
    primary_site: str | None = None

    @property
    def is_complete(self) -> bool:
        """Whether organ, procedure and at least one diagnosis were found."""
        return bool(self.organ and self.procedure and self.diagnoses)


FIELD_NAMES = tuple(field.name for field in fields(ReportFields))
_NOTE = Hinted(r"\n?\s*\b(?:note|comment|remark)s?\s*[):]", "note", "comment", "remark")
_NUMBERED = re.compile(r"(?:^|\n)\s*(?:#\s*)?(?:\d{1,2}|[A-D])[.:]\s+")
_WITH = re.compile(r"(?<!consistent )(?<!compatible )\b(?:with|and with|showing)\b\s*(.*)$", re.IGNORECASE)
_LIST_ITEM = re.compile(r"\s*\b\d\)\s*|\s*,\s*|\s+and\s+")
_END_OF_NAME = re.compile(r",|\bwith(?:out)?\b|\barising\b|\(|\s-\s|:|;|\.(?:\s|$)", re.IGNORECASE)
_NOT_A_FEATURE = re.compile(
    r"involvement of (?!.*glandular)|dysplasia|necrosis|^tumor volume|^gleason|^grade|^$|nuclear grade", re.I
)
_FAVORED = re.compile(r"\bfavor(?:s|ing|ed)?\s+([a-z][\w -]*?)\s*(?=[,.;()\n]|$)", re.IGNORECASE)
_PRIMARY = Hinted(
    r"\bfrom (?:the )?([a-z][\w ]*?) primary|(?:primary|origin) (?:in|of) (?:the )?(\w+)|([\w]+) primary$",
    "primary",
    "origin",
)
_MALT = re.compile(r"^(?:extranodal marginal zone (?:b cell )?lymphoma\b.*|malt lymphoma)$")
_UROTHELIAL = re.compile(r"urothelial|papillary urothelial|transitional cell", re.IGNORECASE)


def organ(report: str) -> str:
    """Organ of a report: that of its heading `Organ, procedure;`, else one named in its text, else its first words.

    Lower case, one name for each organ. An empty report gives "".
    """
    text = mend(report.strip())
    heading = re.split(r"[,;\n]", text, maxsplit=1)[0]
    if is_organ(heading):
        return canonical_organ(heading)
    return _organ_in(text) or canonical_organ(heading)


def parse_report(report: str) -> ReportFields:
    """Read the fields of a report in the REG style (`Organ, procedure;` and findings) or in running text.

    Never raises for a string; what is not stated stays None.
    """
    text = mend(report.strip())
    result = ReportFields()
    heading, body = _split_heading(text)
    if heading:
        result.organ, result.procedure = heading
        findings, note = _findings(body)
        named = [(_name(finding), finding) for finding in findings]
    else:
        result.organ = _organ_in(text)
        result.procedure = _procedure_in(text)
        note, named = text, _named_in_running_text(text)
        findings = []
    result.diagnoses = tuple(dict.fromkeys(name for name, _ in named if name))
    for name, finding in named:
        _read_finding(result, name or "", finding)
    if not heading:
        _read_finding(result, next(iter(result.diagnoses), ""), text)
    result.muscle_proper = grades.muscle_proper(note) or grades.muscle_proper(body)
    result.behavior = _worst(named)
    denied = NO_TUMOR_NAME in result.diagnoses or bool(NO_TUMOR.search(body))
    result.no_tumor = denied and result.behavior in (None, BEHAVIORS[0])
    result.features = tuple(sorted({feature for finding in findings for feature in _features(finding)} - {""}))
    return result


def parse_all(reports: Sequence[str]) -> dict[str, ReportFields]:
    """Fields of each distinct report, in several processes where there are many."""
    texts = list(dict.fromkeys(reports))
    tasks = slices(len(texts), TEXTS_AT_A_TIME)
    parts = map_in_processes(_parse_slice, texts, tasks, num_items=len(texts) // 2)  # a pair takes twice as long
    return dict(zip(texts, (fields for part in parts for fields in part), strict=True))


def _parse_slice(texts: list[str], part: slice) -> list[ReportFields]:
    return [parse_report(text) for text in texts[part]]


def _split_heading(text: str) -> tuple[tuple[str, str], str] | tuple[None, str]:
    """((organ, procedure), the rest) of a REG-style report, or (None, text)."""
    found = re.match(r"\s*([^,;\n]{2,40}),\s*([^;\n]{3,80})(?:;|\n|$)(.*)$", text, re.DOTALL)
    if found and is_organ(found.group(1)):
        procedure = " ".join(found.group(2).lower().split()).rstrip(" .:")
        if PROCEDURE_STEM.search(procedure) or found.group(3).strip():
            return (canonical_organ(found.group(1)), procedure), found.group(3)
    return None, text


def _findings(body: str) -> tuple[list[str], str]:
    """Findings of the body, each without its number, and the note after them."""
    note = _NOTE.search(body)
    text, remark = (body[: note.start()], body[note.end() :]) if note else (body, "")
    parts = [part.strip() for part in _NUMBERED.split(text)]
    return [part for part in parts if part], remark


def _name(finding: str) -> str:
    """Name of the diagnosis at the head of a finding, without grade and qualifiers."""
    line = " ".join(finding.split())
    if NO_TUMOR.match(line) or re.match(r"no (?:evidence|tumor)", line, re.IGNORECASE):
        return NO_TUMOR_NAME
    name = _END_OF_NAME.split(line, maxsplit=1)[0].strip(" -.").lower()
    name = re.sub(r"^(?:well|moderately|poorly)[- ](?:to[- ]\w+[- ])?differentiated\s+", "", name)
    name = re.sub(r"\s+of (?:the )?(?:prostate|breast|lung|stomach|colon|bladder)$", "", name)
    name = _MALT.sub(MALT_LYMPHOMA, name)
    return SYNONYMS.get(name, name)


def _named_in_running_text(text: str) -> list[tuple[str, str]]:
    """(diagnosis, its sentence) of running text; without what is denied; "no tumor" where all of it is."""
    found: dict[str, str] = {}
    denied = False
    for sentence in re.split(r"(?<=[a-z)%])[.;]\s|\n|;", text):
        denied |= bool(NO_TUMOR.search(sentence))
        for stem in DIAGNOSIS_STEM.finditer(sentence):
            if NEGATION.search(sentence[: stem.end()]):
                continue
            before = WORDS_BEFORE.search(sentence[: stem.start()])
            name = NOT_OF_THE_NAME.sub("", (before.group() if before else "") + stem.group()).lower().strip()
            name = re.sub(r"^(?:low|high)[- ]grade (?=.*urothelial)", "", name)
            found.setdefault(SYNONYMS.get(name, name), sentence)
    malignant = any(behavior_of(name) in BEHAVIORS[2:] for name in found)
    no_tumor = [(NO_TUMOR_NAME, text)] if denied and not malignant else []
    return no_tumor + list(found.items())


def _organ_in(text: str) -> str | None:
    """Organ that running text names first."""
    found = ORGAN_IN_TEXT.search(text)
    return canonical_organ(found.group()) if found else None


def _procedure_in(text: str) -> str | None:
    found = PROCEDURE_STEM.search(text)
    if not found:
        return None
    before = WORDS_BEFORE.search(text[: found.start()])
    words = ((before.group() if before else "") + found.group()).lower().split()
    organs = [word for word in words if is_organ(word)]
    kept = words[max((words.index(word) + 1 for word in organs if word != words[-1]), default=0) :]
    return NOT_OF_THE_NAME.sub("", " ".join(kept)) or None


def _read_finding(result: ReportFields, name: str, finding: str) -> None:
    """Fill what `result` does not know yet from one finding."""
    line = " ".join(finding.split())
    stated = {field: read(line) for field, read in grades.OF_ANY_FINDING.items()} | grades.gleason(line)
    behavior = behavior_of(name)
    in_situ = behavior == "in situ"
    if behavior == "malignant" and (result.organ in ("breast", "nipple", None) or "nottingham" in line.lower()):
        stated |= grades.nottingham(line)
    if in_situ or "in situ" in line:
        stated["nuclear_grade"] = grades.nuclear_grade(line)
    else:
        stated.pop("growth_pattern")
    if _UROTHELIAL.search(name):
        stated["who_grade"] = grades.who_grade(line)
    favored, primary = _FAVORED.search(line), _PRIMARY.search(line)
    if favored and not favored.group(1).endswith("primary"):
        stated["favored"] = favored.group(1).lower()
    if primary:
        stated["primary_site"] = next(part for part in primary.groups() if part).lower()
    for field, value in stated.items():
        if getattr(result, field) is None and value is not None:
            setattr(result, field, value)


def _features(finding: str) -> list[str]:
    """What a finding comes `with`, but for what has a field of its own."""
    line = re.sub(r"\((?:[^()]*)\)", "", " ".join(re.split(r"(?:^|\n)\s*- \w", finding)[0].split()))
    found = _WITH.search(line)
    parts = _LIST_ITEM.split(found.group(1)) if found else []
    parts = [re.sub(r"^(?:and |with |or )", "", part.strip(" .,;:-").lower()) for part in parts]
    return [re.sub(r"^involvement of (?=glandular)", "", part) for part in parts if not _NOT_A_FEATURE.search(part)]


def _worst(named: list[tuple[str, str]]) -> str | None:
    """Worst behavior of the findings, or None where not one is known."""
    known = [
        behavior_of(name, dysplasia=grades.dysplasia(" ".join(finding.split()))) for name, finding in named if name
    ]
    ranks = [BEHAVIORS.index(behavior) for behavior in known if behavior]
    return BEHAVIORS[max(ranks)] if ranks else None
