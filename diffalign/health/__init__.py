"""Health of a run: pure functions from logged rows to findings in words. Only the standard library is used."""

from diffalign.health.ending import ENDINGS, NOT_FINISHED, WITHOUT_SPREAD, examine_ending
from diffalign.health.findings import FINDINGS, Finding, describe
from diffalign.health.label_checks import LabelledGroup, examine_labels
from diffalign.health.watch import Watch, examine

__all__ = [
    "ENDINGS",
    "FINDINGS",
    "NOT_FINISHED",
    "WITHOUT_SPREAD",
    "Finding",
    "LabelledGroup",
    "Watch",
    "describe",
    "examine",
    "examine_ending",
    "examine_labels",
]
