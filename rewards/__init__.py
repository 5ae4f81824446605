"""Rewards: one file a family, one seam (`Reward`), a plain table of names. Useful alone, without a config."""

import difflib
import inspect
from dataclasses import fields
from typing import Any

from diffalign.errors import DiffalignError
from diffalign.rewards.aesthetic import Aesthetic
from diffalign.rewards.base import Reward
from diffalign.rewards.clip import CLIPScore, PickScore
from diffalign.rewards.detection import Detection, Detector
from diffalign.rewards.geneval import GenEvalReward, GenEvalSettings
from diffalign.rewards.hpsv2 import HPSv2
from diffalign.rewards.hpsv3 import HPSv3
from diffalign.rewards.imagereward import ImageReward
from diffalign.rewards.ocr import OCRReward
from diffalign.rewards.pixel_rewards import JpegCompressibility, Sharpness
from diffalign.rewards.unifiedreward import UnifiedReward
from diffalign.rewards.vqascore import VQAScore
from diffalign.rewards.zreward import ZReward

REWARDS: dict[str, type[Reward]] = {
    "pickscore": PickScore,
    "hpsv2": HPSv2,
    "hpsv3": HPSv3,
    "imagereward": ImageReward,
    "clipscore": CLIPScore,
    "aesthetic": Aesthetic,
    "vqascore": VQAScore,
    "unifiedreward": UnifiedReward,
    "zreward": ZReward,
    "geneval": GenEvalReward,
    "ocr": OCRReward,
    "jpeg_compressibility": JpegCompressibility,
    "sharpness": Sharpness,
}


def load_reward(name: str, **options: Any) -> Reward:
    """Build a reward by name; `options` are its own arguments (GenEval: `detector` and its thresholds).

    Raises DiffalignError for a name or an option that does not exist. Weights load with the first image.
    """
    if name not in REWARDS:
        close = difflib.get_close_matches(name, REWARDS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(REWARDS)}"
        raise DiffalignError(f"unknown reward {name!r}: {hint}")
    known = accepted(name)
    for option in options:
        if option not in known:
            close = difflib.get_close_matches(option, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"its settings are {', '.join(sorted(known)) or 'none'}"
            raise DiffalignError(f"reward {name}: unknown option {option!r}; {hint}")
    return REWARDS[name](**options)


def accepted(name: str) -> set[str]:
    """Names of the options of a reward: those of its own constructor, and of those that it hands keywords on to."""
    known = {field.name for field in fields(GenEvalSettings)} if name == "geneval" else set()
    for kind in REWARDS[name].__mro__:
        own = vars(kind).get("__init__")
        if own is None:
            continue
        parameters = inspect.signature(own).parameters.values()
        known |= {
            p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name != "self"
        }
        if not any(p.kind == p.VAR_KEYWORD for p in parameters):
            break
    return known


__all__ = ["REWARDS", "Detection", "Detector", "GenEvalReward", "OCRReward", "Reward", "accepted", "load_reward"]
