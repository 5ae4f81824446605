"""Rewards: one file a family, one seam (`Reward`), a plain table of names. Useful alone, without a config."""

import difflib
import inspect
from dataclasses import fields
from typing import Any

from diffalign.errors import DiffalignError
from diffalign.plugins import REWARD_GROUP, find_class, offered_names
from diffalign.rewards.aesthetic import Aesthetic
from diffalign.rewards.base import LABEL, TAKEN_COLUMNS, TAKEN_NAMES, Reward
from diffalign.rewards.clip import CLIPScore, PickScore
from diffalign.rewards.detection import Detection, Detector
from diffalign.rewards.geneval import GenEvalReward, GenEvalSettings
from diffalign.rewards.group_judge import GroupJudge
from diffalign.rewards.hpsv2 import HPSv2
from diffalign.rewards.hpsv3 import HPSv3
from diffalign.rewards.hpsv3_plus import HPSv3Plus
from diffalign.rewards.imagereward import ImageReward
from diffalign.rewards.ocr import OCRReward
from diffalign.rewards.personal import Personal
from diffalign.rewards.pixel_rewards import JpegCompressibility, Sharpness
from diffalign.rewards.remote import Remote
from diffalign.rewards.unifiedreward import UnifiedReward
from diffalign.rewards.unifiedreward_pairs import UnifiedRewardFlex, UnifiedRewardThink
from diffalign.rewards.vlm_judge import VLMJudge
from diffalign.rewards.vqa import VQA
from diffalign.rewards.vqascore import VQAScore
from diffalign.rewards.zreward import ZReward

REWARDS: dict[str, type[Reward]] = {
    "pickscore": PickScore,
    "hpsv2": HPSv2,
    "hpsv3": HPSv3,
    "hpsv3_plus": HPSv3Plus,
    "imagereward": ImageReward,
    "clipscore": CLIPScore,
    "aesthetic": Aesthetic,
    "vqascore": VQAScore,
    "vqa": VQA,
    "unifiedreward": UnifiedReward,
    "unifiedreward_think": UnifiedRewardThink,
    "unifiedreward_flex": UnifiedRewardFlex,
    "zreward": ZReward,
    "vlm_judge": VLMJudge,
    "group_judge": GroupJudge,
    "geneval": GenEvalReward,
    "ocr": OCRReward,
    "personal": Personal,
    "jpeg_compressibility": JpegCompressibility,
    "sharpness": Sharpness,
    "remote": Remote,
}


REQUIRED = ("name", "columns", "range", "licence", "weights")


def find_reward(name: str) -> type[Reward]:
    """Return the class of a reward: ours by its name, another package's by its entry point or as `module:Class`.

    A reward has one name, the `name` of its class: columns and files are called by it, and its entry point must be. Raises
    DiffalignError for an unknown name, and for a class that is no reward or does not state what a reward states.
    """
    found = find_class(name, REWARDS, REWARD_GROUP, Reward)
    if name in REWARDS:
        return found
    missing = [one for one in REQUIRED if one not in dir(found)]
    if missing or inspect.isabstract(found):
        lacks = missing[0] if missing else "measure"
        raise DiffalignError(f"{name}: {found.__name__} is no complete reward, it has no {lacks}")
    if not LABEL.fullmatch(found.name):
        raise DiffalignError(f"{name}: its class calls itself {found.name!r}; use letters, digits, - and _ alone")
    if found.name in TAKEN_NAMES:
        raise DiffalignError(
            f"{name}: its class calls itself {found.name}, which is a column of every table; rename it"
        )
    if ":" not in name and found.name != name:
        raise DiffalignError(f"{name}: its class calls itself {found.name!r}; give the entry point the same name")
    return found


def foreign_rewards() -> tuple[dict[str, type[Reward]], list[str]]:
    """Return the rewards that other packages offer, by name, and in one line each why others cannot be used."""
    found, problems = {}, []
    for name in offered_names(REWARD_GROUP):
        try:
            if name in REWARDS:
                raise DiffalignError(
                    f"{name}: another package gives its reward the name of ours; write its module:Class"
                )
            found[name] = find_reward(name)
        except DiffalignError as error:
            problems.append(str(error))
    return found, problems


def load_reward(name: str, **options: Any) -> Reward:
    """Build a reward by name; `options` are its own arguments (GenEval: `detector` and its thresholds).

    Raises DiffalignError for a name or an option that does not exist. Weights load with the first image.
    """
    kind = find_reward(name)
    known = accepted(name)
    for option in options:
        if option not in known:
            close = difflib.get_close_matches(option, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"its settings are {', '.join(sorted(known)) or 'none'}"
            raise DiffalignError(f"reward {name}: unknown option {option!r}; {hint}")
    made = kind(**options)
    taken = [column for column in made.columns if column in TAKEN_COLUMNS]
    if taken or len(set(made.columns)) < len(made.columns):
        what = f"{taken[0]}, which is a column of every table" if taken else "the same twice"
        raise DiffalignError(f"reward {name}: calls a column {what}; rename it")
    return made


def accepted(name: str) -> set[str]:
    """Return the names of a reward's options: its constructor's, and those of the constructors that get its keywords.

    Raises DiffalignError for an unknown name.
    """
    known = {field.name for field in fields(GenEvalSettings)} if name == "geneval" else set()
    for kind in find_reward(name).__mro__:
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


def takes(name: str, option: str) -> bool:
    """Return whether a reward has an option; False for an unknown name, which `load_reward` refuses."""
    try:
        return option in accepted(name)
    except DiffalignError:
        return False


__all__ = [
    "REWARDS",
    "Detection",
    "Detector",
    "GenEvalReward",
    "OCRReward",
    "Reward",
    "accepted",
    "find_reward",
    "foreign_rewards",
    "load_reward",
    "takes",
]
