"""Objectives: pure functions of prediction errors, one file per paper.

They need torch and nothing else. Importing this package does not import torch: the config is built from these classes, and
its errors must not wait for torch to load. Inside functions torch is imported where a tensor's own methods are not enough.
"""

import inspect
from typing import Any

from diffalign.errors import DiffalignError
from diffalign.objectives.awm import AWM
from diffalign.objectives.base import (
    Charts,
    GroupErrors,
    Objective,
    ObjectiveOutput,
    best_and_worst,
    check_labels,
    has_preference,
    label_range,
    labelled_count,
    ranking,
)
from diffalign.objectives.constrained import ConstrainedDPO
from diffalign.objectives.ddo import DDO
from diffalign.objectives.disco import DisCO
from diffalign.objectives.dpo import DiffusionDPO
from diffalign.objectives.gdro import GDRO
from diffalign.objectives.group_dpo import GroupDPO
from diffalign.objectives.ipo import IPO
from diffalign.objectives.linear_dpo import LinearDPO
from diffalign.objectives.listwise import Listwise
from diffalign.objectives.madpo import MADPO
from diffalign.objectives.nft import NFT
from diffalign.objectives.rankdpo import RankDPO
from diffalign.objectives.sft import SFT
from diffalign.objectives.simpo import SimPO
from diffalign.objectives.smpo import SmPO
from diffalign.plugins import find_class

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
    "group_dpo": GroupDPO,
    "nft": NFT,
    "awm": AWM,
    "listwise": Listwise,
    "linear_dpo": LinearDPO,
}

GROUP = "diffalign.objectives"
"""The entry points by which other packages offer objectives."""


def find_objective(name: str) -> type[Objective]:
    """Return the class of an objective: ours by its name, another package's by its entry point or as `module:Class`.

    Raises DiffalignError for an unknown name, and for a class that is no frozen dataclass derived from `Objective`.
    """
    found = find_class(name, OBJECTIVES, GROUP, Objective)
    if not _is_frozen(found) or inspect.isabstract(found):
        raise DiffalignError(f"{name}: an objective is a frozen dataclass with a __call__, and {found.__name__} is not")
    return found


def _is_frozen(kind: type[Any]) -> bool:
    """Return whether a class is itself, and not by inheritance alone, a frozen dataclass."""
    return "__dataclass_params__" in vars(kind) and bool(kind.__dataclass_params__.frozen)


__all__ = [
    "AWM",
    "DDO",
    "GDRO",
    "IPO",
    "MADPO",
    "NFT",
    "OBJECTIVES",
    "SFT",
    "Charts",
    "ConstrainedDPO",
    "DiffusionDPO",
    "DisCO",
    "GroupDPO",
    "GroupErrors",
    "LinearDPO",
    "Listwise",
    "Objective",
    "ObjectiveOutput",
    "RankDPO",
    "SimPO",
    "SmPO",
    "best_and_worst",
    "check_labels",
    "find_objective",
    "has_preference",
    "label_range",
    "labelled_count",
    "ranking",
]
