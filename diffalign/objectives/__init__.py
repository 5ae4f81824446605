"""Objectives: pure functions of prediction errors, one file per paper. This package imports torch and nothing else."""

from typing import Any

from diffalign.objectives.base import (
    GroupErrors,
    Objective,
    ObjectiveOutput,
    best_and_worst,
    check_labels,
    has_preference,
    ranking,
)
from diffalign.objectives.dpo import DiffusionDPO
from diffalign.objectives.sft import SFT

OBJECTIVES: dict[str, type[Any]] = {"dpo": DiffusionDPO, "sft": SFT}

__all__ = [
    "OBJECTIVES",
    "SFT",
    "DiffusionDPO",
    "GroupErrors",
    "Objective",
    "ObjectiveOutput",
    "best_and_worst",
    "check_labels",
    "has_preference",
    "ranking",
]
