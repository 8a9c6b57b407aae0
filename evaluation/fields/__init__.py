"""Fields of a pathology report, read from its text: organ, procedure, diagnoses, grades, percentages, invasion.

Knows the REG style (`Organ, procedure;` and the findings below) and, less well, reports in running text.
"""

from evaluation.fields.parse import FIELD_NAMES, NO_TUMOR_NAME, ReportFields, organ, parse_all, parse_report
from evaluation.fields.terms import BEHAVIORS, behavior_of

__all__ = [
    "BEHAVIORS",
    "FIELD_NAMES",
    "NO_TUMOR_NAME",
    "ReportFields",
    "behavior_of",
    "organ",
    "parse_all",
    "parse_report",
]
