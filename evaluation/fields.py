"""Fields of a pathology report, read from its text. Knows the REG style: `Organ, procedure;` and the findings below."""

import re

# Both spellings occur in REG 2025 and mean the same organ.
ORGAN_SYNONYMS = {"bladder": "urinary bladder", "cervix": "uterine cervix"}


def organ(report: str) -> str:
    """Organ of a REG-style report: its text before the first comma, lower-cased, one name per organ.

    A heading that ends at a semicolon or line break before any comma is taken up to there. An empty report gives "".
    """
    heading = re.split(r"[,;\n]", report.strip(), maxsplit=1)[0]
    name = " ".join(heading.lower().split())
    return ORGAN_SYNONYMS.get(name, name)
