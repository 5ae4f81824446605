"""Turn names into devices and rewards; scoring needs nothing else, and no package that only training needs.

`detector: shapes` becomes a detector that is handed to the reward, since rewards know nothing of the embedded world.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

from diffalign import testbed
from diffalign.data.shared_tasks import local_rank_and_world_size
from diffalign.errors import DiffalignError
from diffalign.hub import cache_alone, hub_answers
from diffalign.rewards import REWARDS, Detector, Reward, load_reward, takes
from diffalign.rewards.groupwise import GroupReward
from diffalign.testbed.detector import ShapeDetector

if TYPE_CHECKING:
    from diffalign.config import RewardSection
    from diffalign.data.prompts import PromptRow
    from diffalign.scoring.spec import RewardSpec

DEVICES = ("auto", "cpu", "cuda")
DETECTORS: dict[str, type[Detector]] = {"shapes": ShapeDetector}
FIRST_JUDGES = ("hpsv2", "pickscore")
"""Rewards that judge any image with a prompt, in the order in which they are tried where none is named."""


def resolve_device(device: str) -> str:
    """Return `cpu` or `cuda` for auto, cpu or cuda. Raise DiffalignError for CUDA on a machine without it."""
    if device not in DEVICES:
        raise DiffalignError(f"device {device}: unknown; one of {', '.join(DEVICES)}")
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise DiffalignError("device cuda: this machine has no usable CUDA device; use cpu or auto")
    return "cuda" if device != "cpu" and available else "cpu"


def process_device(device: str) -> str:
    """Return what `resolve_device` returns; of several processes on CUDA each gets a GPU of its own, such as `cuda:1`."""
    resolved, (number, world) = resolve_device(device), local_rank_and_world_size()
    return f"cuda:{number % torch.cuda.device_count()}" if resolved == "cuda" and world > 1 else resolved


def settled_rewards(
    sections: Sequence[RewardSection], model: str, prompts: str, key: str, trained_on: Sequence[str] = ()
) -> list[RewardSection]:
    """Return rewards with what is left open settled: nothing of the embedded world judges other models.

    Without a name: GenEval there, elsewhere the first of FIRST_JUDGES that is here or can be fetched. Without a detector:
    the world's own there, elsewhere GenEval's own. Raises DiffalignError where no such reward is to be had.
    """
    if model in testbed.MODELS or prompts.startswith("testbed:"):
        return list(sections)
    settled = []
    for section in sections:
        changed: dict[str, Any] = {}
        if "name" not in section.model_fields_set:
            changed["name"] = _first_judge(key, trained_on)
        name = changed.get("name", section.name)
        if "detector" not in section.model_fields_set and takes(name, "detector"):
            changed["detector"] = None
        settled.append(section.model_copy(update=changed) if changed else section)
    return settled


def _first_judge(key: str, trained_on: Sequence[str]) -> str:
    """Return the reward that judges where none is named: one whose weights are here, else one that can be fetched."""
    names = [name for name in FIRST_JUDGES if name not in trained_on]
    for name in names:
        with cache_alone(), suppress(DiffalignError):
            load_reward(name).weights_id()
            return name
    if hub_answers():
        return names[0]
    raise DiffalignError(
        f"{key}: none is named, the weights of {' and '.join(names)} are not here, and the hub gave no answer; name a reward "
        "that is here, such as clipscore, or fetch one (`diffalign rewards` lists them)"
    )


def open_reward(section: RewardSection, device: str) -> Reward:
    """Build the reward that a section names; `detector` counts for rewards that take one."""
    named = {"detector": section.detector} if section.detector is not None and takes(section.name, "detector") else {}
    if section.address is not None:
        named["url"] = section.address
    reward = build_reward(section.name, {**section.options, **named}, device)
    if isinstance(reward, GroupReward):
        raise DiffalignError(
            f"reward {section.name}: it compares images of one prompt; score a folder or dataset with `diffalign score`"
        )
    return reward


def build_reward(name: str, options: Mapping[str, Any], device: str) -> Reward:
    """Build a reward on `device`, unless its options name another; `detector: shapes` becomes the detector itself.

    Raises DiffalignError for a name, an option or a detector that does not exist.
    """
    given = dict(options)
    if takes(name, "device"):
        given.setdefault("device", device)
    detector = given.get("detector")
    if isinstance(detector, str) and detector in DETECTORS:
        given["detector"] = DETECTORS[detector]()
    elif detector is not None and name in REWARDS:  # a reward of another package may have detectors of its own
        raise DiffalignError(f"reward {name}: unknown detector {detector!r}; there are {', '.join(DETECTORS)}")
    return load_reward(name, **given)


def build_rewards(specs: Sequence[RewardSpec], device: str, *, served: bool) -> dict[str, Reward]:
    """Build the rewards that are computed here or, with `served`, those behind an address; return them by label.

    An address may not answer for minutes: whoever checks something else asks for those last.
    """
    return {s.label: build_reward(s.name, s.options, device) for s in specs if (s.name == "remote") == served}


def open_rewards(
    sections: Sequence[RewardSection], rows: list[PromptRow], device: str, key: str, prompts: str
) -> dict[str, Reward]:
    """Build rewards by name. Raise DiffalignError before any image is drawn where one cannot score a prompt."""
    opened = [open_reward(section, device) for section in sections]
    rewards = {section.label: reward for section, reward in zip(sections, opened, strict=True)}
    for name, reward in rewards.items():
        for row in rows:
            if reason := reward.reason_not_scorable(row.prompt, row.metadata):
                raise DiffalignError(
                    f"{key}: {name} cannot judge {row.prompt!r} of {prompts}: {reason}; name another reward, such as "
                    "{name: pickscore}, or give prompts with what it needs"
                )
    return rewards
