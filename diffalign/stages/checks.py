"""What is looked at before a model is loaded: by the same functions in `--dry-run` and in a run, so mistakes cost seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from diffalign.config import RunConfig, ValidationSection
from diffalign.data.prompts import PromptRow
from diffalign.errors import DiffalignError
from diffalign.hub import cache_alone, hub_answers
from diffalign.rewards import Reward
from diffalign.stages.resolve import resolve_prompts
from diffalign.stages.resolve_rewards import open_rewards
from diffalign.training.optim import check_installed
from diffalign.training.tracking import check_trackers


@dataclass(frozen=True)
class Judged:
    """Prompts that are held out, and the rewards that judge their images."""

    rows: list[PromptRow]
    rewards: dict[str, Reward]


def check_packages(config: RunConfig) -> None:
    """Refuse an optimiser or a tracker whose package is not installed."""
    check_installed(config.optimizer)
    check_trackers(config.tracking.trackers)


def check_weights(rewards: Mapping[str, Reward], dry_run: bool) -> dict[str, str]:
    """Fetch the weights of rewards, and return in words what each judges with.

    dry_run: download nothing; say whether they are here. Raises DiffalignError for weights that a run cannot get.
    """
    said = {}
    for label, reward in rewards.items():
        if not dry_run:
            reward.weights_id()
            continue
        try:
            with cache_alone():
                where = f"{reward.weights_id()}, here"
        except DiffalignError as error:
            if "not installed" in str(error) or "does not exist" in str(error):
                raise
            download = "to be downloaded" if hub_answers() else f"not here: {error}"
            where = f"{reward.weights} ({reward.size}), {download}"
        said[label] = f"{where}; licence: {reward.licence}"
    return said


def check_validation(section: ValidationSection, device: str, dry_run: bool) -> tuple[Judged | None, dict[str, str]]:
    """Read the prompts of a validation, build its rewards and fetch their weights; None where no validation is wanted.

    Also returns what `check_weights` says. Raises DiffalignError for prompts that cannot be read, a reward that does not
    exist, and one that cannot judge a prompt.
    """
    if section.every is None or section.prompts is None:
        return None, {}
    rows = resolve_prompts(section.prompts, section.n)
    rewards = open_rewards(section.rewards, rows, device, "validation.rewards", section.prompts)
    return Judged(rows, rewards), check_weights(rewards, dry_run)
