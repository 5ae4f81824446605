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
from diffalign.objectives.gdro import GDRO
from diffalign.objectives.rankdpo import RankDPO
from diffalign.objectives.sft import SFT
from diffalign.objectives.smpo import SmPO

OBJECTIVES: dict[str, type[Any]] = {
    "dpo": DiffusionDPO,
    "sft": SFT,
    "rankdpo": RankDPO,
    "smpo": SmPO,
    "gdro": GDRO,
}

__all__ = [
    "GDRO",
    "OBJECTIVES",
    "SFT",
    "DiffusionDPO",
    "GroupErrors",
    "Objective",
    "ObjectiveOutput",
    "RankDPO",
    "SmPO",
    "best_and_worst",
    "check_labels",
    "has_preference",
    "ranking",
]
