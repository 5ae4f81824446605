"""Rewards: one file a family, one seam (`Reward`), a plain table of names. Useful alone, without a config."""

import difflib
from typing import Any

from diffalign.errors import DiffalignError
from diffalign.rewards.base import Reward
from diffalign.rewards.detection import Detection, Detector
from diffalign.rewards.geneval import GenEvalReward

REWARDS: dict[str, type[Reward]] = {"geneval": GenEvalReward}


def load_reward(name: str, **options: Any) -> Reward:
    """Build a reward by name; `options` are its own arguments (GenEval: `detector` and its thresholds)."""
    if name not in REWARDS:
        close = difflib.get_close_matches(name, REWARDS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(REWARDS)}"
        raise DiffalignError(f"unknown reward {name!r}: {hint}")
    return REWARDS[name](**options)


__all__ = ["REWARDS", "Detection", "Detector", "GenEvalReward", "Reward", "load_reward"]
