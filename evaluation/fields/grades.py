"""Grades, percentages, invasion and specimen notes of one finding, each read by its own expression."""

import re
from collections.abc import Callable
from typing import Any

from evaluation.fields.hinted import Hinted

ROMAN = {"i": 1, "ii": 2, "iii": 3, "iv": 4, "1": 1, "2": 2, "3": 3, "4": 4}
_NUMBER = r"(\d+(?:\.\d+)?)"
_ABOUT = r"(?:\s*(?:is|of|:|=|about|approximately|approx\.?|estimated at|<|>|~|less than|more than))*\s*"

_TUBULES = re.compile(rf"tubul\w*(?: formation| differentiation)?(?: score)?{_ABOUT}([123])\b", re.I)
_NUCLEI = re.compile(rf"nucle(?:ar|i|us)(?: grade| pleomorphism| atypia)?(?: score)?{_ABOUT}([123])\b", re.I)
_MITOSES = re.compile(rf"mito(?:ses|sis|tic)(?: rate| activity| count| index)?(?: score)?{_ABOUT}([123])\b", re.I)
_NOTTINGHAM_GRADE = re.compile(
    r"(?:nottingham|histologic(?:al)?|bloom[- ]richardson|sbr|combined)?\s*(?:combined )?(?:histologic(?:al)? )?"
    r"grade(?: is| of|:)?\s*(iii|ii|i|[123])\b(?!\s*/\s*4)",
    re.I,
)
_NOTTINGHAM_TOTAL = re.compile(
    r"(?:nottingham|total|combined|overall)(?: histologic)?(?: score)?(?: is| of|:)?\s*([3-9])\s*(?:/\s*9|\bof 9)", re.I
)
_GLEASON = re.compile(
    r"gleason(?:'?s)?(?: score| grade| sum| pattern)?(?:\s*[:=]|\s+is|\s+of)?\s*"
    r"(?:(?:(\d{1,2})\s*[=:]?\s*\(?\s*)?(\d)\s*\+\s*(\d)(?:\s*=\s*(\d{1,2}))?|(\d{1,2})(?![\d.]*\s*%))",
    re.I,
)
_GRADE_GROUP = Hinted(
    r"(?:grade group|isup(?: grade)?(?: group)?|who grade group|prognostic grade group)(?: is| of"
    r"|:)?\s*(i{1,3}v?|iv|v|[1-5])\b",
    "grade group",
    "isup",
)
_GROUP_NUMBERS = {"i": 1, "ii": 2, "iii": 3, "iv": 4, "v": 5} | {str(number): number for number in range(1, 6)}
_VOLUME = [
    re.compile(rf"(?:tumor|carcinoma|cancer)\s*(?:volume|percentage|content|proportion|burden"
        rf"|extent){_ABOUT}{_NUMBER}\s*%", re.I),
    re.compile(rf"(?:involv\w+|occup\w+|compris\w+){_ABOUT}{_NUMBER}\s*%\s*of\s*(?:the )?(?:\w+ )?(?:tissue"
        rf"|core|cores|specimen|biopsy)", re.I),
    re.compile(rf"{_NUMBER}\s*%\s*(?:of\s*(?:the )?(?:\w+ )?(?:tissue|core|cores|specimen|biopsy)\s*(?:is "
        rf"|are )?involved|tumor)", re.I),
]  # fmt: skip
_PATTERN_4 = Hinted(rf"pattern\s*4{_ABOUT}{_NUMBER}\s*%|{_NUMBER}\s*%\s*(?:gleason )?pattern\s*4", "pattern")
_PATTERN_5 = Hinted(rf"pattern\s*5{_ABOUT}{_NUMBER}\s*%|{_NUMBER}\s*%\s*(?:gleason )?pattern\s*5", "pattern")
_DYSPLASIA = Hinted(
    r"(low|high)[- ]grade (?:epithelial |glandular )?dysplasia|dysplasia,?\s*(low|high)[- ]grade", "dysplasia"
)
_NO_DYSPLASIA = Hinted(r"\b(?:no|without|negative for) dysplasia", "dysplasia")
_WHO_GRADE = re.compile(r"(low|high)[- ]grade(?! (?:dysplasia|squamous|prostatic|nuclear|intraepithelial))", re.I)
_DIFFERENTIATION = re.compile(
    r"\b(well|moderate(?:ly)?|poor(?:ly)?|un)(?:[- ]to[- ](well|moderate(?:ly)?|poor(?:ly)?))?[- ]?differentiated\b",
    re.I,
)
_CIN = Hinted(r"\bcin\s*[- ]?\s*(iii|ii|i|[123])\b", "cin")
_NEUROENDOCRINE = Hinted(r"neuroendocrine|carcinoid|\bnet\b", "neuroendocrine", "carcinoid", "net")
_NET_GRADE = re.compile(r"\bg\s?([123])\b|grade\s*(iii|ii|i|[123])\b", re.I)
_NUCLEAR_GRADE = re.compile(
    r"nuclear grade\s*[:,]?\s*(low|intermediate|high)|(low|intermediate|high)[- ](?:nuclear[- ]grade|grade nuclei)",
    re.I,
)
_GROWTH_PATTERN = re.compile(
    r"\btype\s*:\s*([\w, /]+?)(?=\s*(?:-|nuclear grade|necrosis|$|\n|\d+\.|[.;]))"
    r"|\b((?:cribriform|solid|micropapillary|papillary|flat|comedo)(?:(?:, | and |/)(?:cribriform|solid"
    r"|micropapillary|papillary))*) type\b",
    re.I,
)
_NECROSIS = Hinted(
    r"necrosis\s*:\s*(absent|present|not identified|none)\s*(?:\(\s*([\w -]+)\))?"
    r"|(without|no|with|comedo|focal)[- ](?:evidence of |central |caseating |tumor )?necrosis",
    "necrosis",
)
_DEPTHS = {
    "muscle proper": r"muscle proper|muscularis propria|detrusor(?: muscle)?|proper muscle",
    "subepithelial connective tissue": r"subepithelial connective tissue|lamina propria",
    "submucosa": r"(?<!colonoscopic )submucosa\b",
    "muscularis mucosae": r"muscularis mucosae?",
    "subserosa": r"subserosa|pericolic (?:fat|tissue)|perivesical (?:fat|tissue)",
    "serosa": r"(?<!sub)serosa\b",
    "extraprostatic": r"extraprostatic extension|periprostatic (?:fat|tissue)",
}
_INVASION = {
    depth: re.compile(
        rf"(?:involvement of|involving|inva(?:sion|des?|ding)|infiltrat\w+|extend\w*|extension)\s*(?:of "
        rf"|into |to |in )*(?:the )?"
        rf"(?:superficial |deep )?(?:{words})|(?:{words})\s+(?:invasion|involvement)",
        re.I,
    )
    for depth, words in _DEPTHS.items()
}
_ANY_LAYER = Hinted(
    "|".join(_DEPTHS.values()),
    *("musc", "detrusor", "connective tissue", "lamina propria", "submucosa", "serosa"),
    *("pericolic", "perivesical", "extraprostatic", "periprostatic"),
)
_DEPTH_ORDER = ("extraprostatic", "serosa", "subserosa", "muscle proper", "submucosa", "muscularis mucosae",
                "subepithelial connective tissue")  # fmt: skip
_MUSCLE = Hinted(_DEPTHS["muscle proper"], "musc", "detrusor")
_SAMPLED = r"(?:includ|present|identif|contain|seen|sampled|represent)\w*"
_MUSCLE_ABSENT = re.compile(
    rf"\b(?:no|without|lacks?|lacking|absence of)\s+(?:\w+\s+){{0,2}}(?:{_DEPTHS['muscle proper']})"
    rf"|\bnot\s+(?:\w+\s+)?{_SAMPLED}|\babsent\b",
    re.I,
)
_MUSCLE_PRESENT = re.compile(rf"\b(?:{_SAMPLED}|uninvolved|not involved)\b", re.I)
_UNINVADED = re.compile(r"\b(?:no|not|without|negative for|free of|absence of)\b[^.;]{0,40}$", re.I)


def gleason(stated: str) -> dict[str, Any]:
    """Gleason score, patterns and grade group. A group that is not stated follows from the patterns (ISUP 2014)."""
    text = re.sub(r"gleason pattern [345]\s*:", "", stated, flags=re.I)  # a share of one pattern, not the score
    found = _GLEASON.search(text)
    group = _GRADE_GROUP.search(text)
    fields: dict[str, Any] = {}
    if found:
        before, primary, secondary, total, alone = (int(part) if part else None for part in found.groups())
        if primary and secondary:
            fields |= {"gleason_primary": primary, "gleason_secondary": secondary}
        fields["gleason_score"] = before or total or alone or (primary or 0) + (secondary or 0)
    if group:
        fields["grade_group"] = _GROUP_NUMBERS[group.group(1).lower()]
    elif fields.get("gleason_score"):
        fields["grade_group"] = group_of(fields["gleason_score"], fields.get("gleason_primary"))
    for name, expression in (("gleason_pattern_4", _PATTERN_4), ("gleason_pattern_5", _PATTERN_5)):
        if share := expression.search(stated):
            fields[name] = float(share.group(1) or share.group(2))
    return fields


def group_of(score: int, primary: int | None) -> int | None:
    """Grade group of a Gleason score (Epstein et al. 2016); None for a 7 without patterns or an impossible score."""
    if score == 7:
        return {3: 2, 4: 3}.get(primary or 0)
    return 1 if 2 <= score <= 6 else {8: 4, 9: 5, 10: 5}.get(score)


def nottingham(text: str) -> dict[str, Any]:
    """Nottingham grade, total (3 to 9) and components (1 to 3) of an invasive breast carcinoma."""
    fields: dict[str, Any] = {}
    for name, expression in (("tubules", _TUBULES), ("nuclei", _NUCLEI), ("mitoses", _MITOSES)):
        if found := expression.search(text):
            fields[f"nottingham_{name}"] = int(found.group(1))
    if total := _NOTTINGHAM_TOTAL.search(text):
        fields["nottingham_total"] = int(total.group(1))
    elif len(fields) == 3:
        fields["nottingham_total"] = sum(fields.values())
    outside = re.sub(r"nuclear grade|grade group", "", text, flags=re.I)
    if grade := _NOTTINGHAM_GRADE.search(outside):
        fields["nottingham_grade"] = ROMAN[grade.group(1).lower()]
    elif "nottingham_total" in fields:  # 3 to 5, 6 to 7, 8 to 9 (Elston and Ellis 1991)
        fields["nottingham_grade"] = 1 + (fields["nottingham_total"] > 5) + (fields["nottingham_total"] > 7)
    return fields


def tumor_volume(text: str) -> float | None:
    """Percentage of the tissue that is tumor."""
    return next((float(found.group(1)) for found in (rule.search(text) for rule in _VOLUME) if found), None)


def dysplasia(text: str) -> str | None:
    """ "low" or "high"; "absent" where the text says so."""
    if found := _DYSPLASIA.search(text):
        return (found.group(1) or found.group(2)).lower()
    return "absent" if _NO_DYSPLASIA.search(text) else None


def who_grade(text: str) -> str | None:
    """ "low" or "high" of an urothelial neoplasm (WHO)."""
    found = _WHO_GRADE.search(text)
    return found.group(1).lower() if found else None


def differentiation(text: str) -> str | None:
    """ "well", "moderate", "poor" or "undifferentiated"; of a range, the worse."""
    found = _DIFFERENTIATION.search(text)
    if not found:
        return None
    word = (found.group(2) or found.group(1)).lower()
    return "undifferentiated" if word == "un" else word.removesuffix("ly")


def cin(text: str) -> int | None:
    """Grade of a cervical intraepithelial neoplasia, 1 to 3; the worst that is named."""
    grades = [ROMAN[grade.lower()] for grade in _CIN.findall(text)]
    return max(grades) if grades else None


def neuroendocrine_grade(text: str) -> int | None:
    """Grade 1 to 3 of a neuroendocrine tumor."""
    found = _NET_GRADE.search(text) if _NEUROENDOCRINE.search(text) else None
    return ROMAN[(found.group(1) or found.group(2)).lower()] if found else None


def nuclear_grade(text: str) -> str | None:
    """ "low", "intermediate" or "high" of a carcinoma in situ."""
    found = _NUCLEAR_GRADE.search(text)
    return (found.group(1) or found.group(2)).lower() if found else None


def growth_pattern(text: str) -> tuple[str, ...] | None:
    """Patterns of a ductal carcinoma in situ, sorted."""
    found = _GROWTH_PATTERN.search(text)
    words = (found.group(1) or found.group(2)).lower() if found else ""
    return tuple(sorted(word.strip() for word in re.split(r",| and |/", words) if word.strip())) or None


def necrosis(text: str) -> str | None:
    """ "absent", "present", "focal" or "comedo"."""
    found = _NECROSIS.search(text)
    if not found:
        return None
    stated, kind, preposition = (part.lower() if part else "" for part in found.groups())
    if stated:
        if stated != "present":
            return "absent"
        return next((name for name in ("comedo", "focal") if name in kind), "present")
    return {"without": "absent", "no": "absent", "comedo": "comedo", "focal": "focal"}.get(preposition, "present")


def invasion_depth(text: str) -> str | None:
    """Deepest layer that the text says is invaded."""
    if not _ANY_LAYER.search(text):
        return None
    for depth in _DEPTH_ORDER:
        for found in _INVASION[depth].finditer(text):
            if not _UNINVADED.search(text[: found.start()]):
                return depth
    return None


def muscle_proper(text: str) -> str | None:
    """ "present" or "absent" in the specimen, as a sentence about the specimen says; an invaded muscle is present."""
    if not _MUSCLE.search(text):
        return None
    for sentence in re.split(r"[.;\n]", text):
        if _MUSCLE.search(sentence) and not _INVASION["muscle proper"].search(sentence):
            if _MUSCLE_ABSENT.search(sentence):
                return "absent"
            if _MUSCLE_PRESENT.search(sentence):
                return "present"
    return "present" if invasion_depth(text) == "muscle proper" else None


# What is read from any finding; Nottingham, WHO and neuroendocrine grades need the finding's kind and are asked for
# in parse.py.
OF_ANY_FINDING: dict[str, Callable[[str], Any]] = {
    "tumor_volume": tumor_volume,
    "differentiation": differentiation,
    "dysplasia": dysplasia,
    "cin": cin,
    "neuroendocrine_grade": neuroendocrine_grade,
    "growth_pattern": growth_pattern,
    "necrosis": necrosis,
    "invasion_depth": invasion_depth,
}
