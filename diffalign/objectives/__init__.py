"""Objectives: pure functions of prediction errors, one file per paper.

They need torch and nothing else. Importing this package does not import torch: the config is built from these classes, and
its errors must not wait for torch to load. Inside functions torch is imported where a tensor's own methods are not enough.
"""

from diffalign.objectives.base import (
    Charts,
    GroupErrors,
    Objective,
    ObjectiveOutput,
    best_and_worst,
    check_labels,
    has_preference,
    ranking,
)
from diffalign.objectives.constrained import ConstrainedDPO
from diffalign.objectives.ddo import DDO
from diffalign.objectives.disco import DisCO
from diffalign.objectives.dpo import DiffusionDPO
from diffalign.objectives.gdro import GDRO
from diffalign.objectives.ipo import IPO
from diffalign.objectives.madpo import MADPO
from diffalign.objectives.rankdpo import RankDPO
from diffalign.objectives.sft import SFT
from diffalign.objectives.simpo import SimPO
from diffalign.objectives.smpo import SmPO

OBJECTIVES: dict[str, type[Objective]] = {
    "dpo": DiffusionDPO,
    "sft": SFT,
    "rankdpo": RankDPO,
    "smpo": SmPO,
    "gdro": GDRO,
    "ipo": IPO,
    "simpo": SimPO,
    "madpo": MADPO,
    "constrained": ConstrainedDPO,
    "disco": DisCO,
    "ddo": DDO,
}

__all__ = [
    "DDO",
    "GDRO",
    "IPO",
    "MADPO",
    "OBJECTIVES",
    "SFT",
    "Charts",
    "ConstrainedDPO",
    "DiffusionDPO",
    "DisCO",
    "GroupErrors",
    "Objective",
    "ObjectiveOutput",
    "RankDPO",
    "SimPO",
    "SmPO",
    "best_and_worst",
    "check_labels",
    "has_preference",
    "ranking",
]
