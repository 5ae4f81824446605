"""Scores of the images that are voted on, stored or computed, and what follows from them: which pair to ask next."""

import math
import os
from collections.abc import Mapping
from typing import Literal

from diffalign.data.dataset import PreferenceDataset
from diffalign.errors import DiffalignError
from diffalign.progress import ImageProgress, say_aside
from diffalign.scoring.items import Item
from diffalign.vote_page.gallery import Gallery
from diffalign.voting.active import Active
from diffalign.voting.balanced import Balanced
from diffalign.voting.questions import Sampler
from diffalign.voting.repeats import Repeats
from diffalign.voting.uniform import Uniform

Asking = Literal["balanced", "random", "active"]
MOST_REPEATS = 0.5
NameScores = dict[str, float]
"""Image's name -> score; NaN where there is none."""


def stored_scores(gallery: Gallery) -> dict[str, NameScores]:
    """Return the scores that a dataset stores, by reward: the first column of each; {} for another gallery."""
    if gallery.dataset is None:
        return {}
    dataset = PreferenceDataset(gallery.dataset)
    return {reward: _named(dataset, reward) for reward in dataset.rewards()}


def scores_by(gallery: Gallery, reward: str, device: str = "auto") -> tuple[str, NameScores]:
    """Return a name and the scores of all images by one reward.

    reward: one that the dataset stores, as NAME or NAME.COLUMN, or one to score with now, as `--reward` takes it. Raises
    DiffalignError where neither is possible, and where no image has a score.
    """
    dataset = None if gallery.dataset is None else PreferenceDataset(gallery.dataset)
    if dataset is not None and reward.partition(".")[0] in dataset.rewards():
        name, found = reward, _named(dataset, reward)
    else:
        name, found = _computed(gallery, reward, device)
    if not any(map(math.isfinite, found.values())):
        raise DiffalignError(f"--reward {reward}: none of the images has a score by it")
    return name, found


def _named(dataset: PreferenceDataset, source: str) -> NameScores:
    reward, _, column = source.partition(".")
    return {f"{group}/{index}": value for (group, index), value in dataset.scores(reward, column or None).items()}


def _computed(gallery: Gallery, reward: str, device: str) -> tuple[str, NameScores]:
    # Here, since they load torch: the page of a vote without a reward is there at once.
    from diffalign.scoring.run import score_items
    from diffalign.scoring.spec import parse
    from diffalign.scoring.store import Store
    from diffalign.stages.resolve_rewards import build_reward, resolve_device

    spec = parse(reward)
    made = build_reward(spec.name, spec.options, resolve_device(device))
    items = [
        Item(name, name, gallery.origin_of[name], group.prompt) for group in gallery.groups for name in group.images
    ]
    found = score_items(
        items,
        {spec.label: made},
        Store(None),
        workers=min(8, os.cpu_count() or 1),
        on_progress=ImageProgress(say_aside),
    )
    return spec.label, {item.name: float(row[spec.label]) for item, row in zip(items, found.rows, strict=True)}


def sampler_of(ask: Asking, repeats: float, scores: Mapping[str, float] | None) -> Sampler:
    """Return what chooses the questions. scores: those of the reward that `active` follows.

    Raises DiffalignError for a share of repeats above a half, and for `active` without scores or scores without it.
    """
    if not 0 <= repeats <= MOST_REPEATS:
        raise DiffalignError(f"--repeats {repeats:g}: a share from 0 to {MOST_REPEATS:g}, such as 0.1")
    if (ask == "active") != (scores is not None):
        raise DiffalignError(
            "--ask active and --reward go together: pairs are asked whose scores by that reward are closest, such as "
            "--ask active --reward personal:weights=FOLDER"
        )
    sampler: Sampler = Balanced() if scores is None and ask == "balanced" else Uniform()
    return Repeats(sampler if scores is None else Active(scores), repeats)
