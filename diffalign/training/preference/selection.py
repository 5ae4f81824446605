"""Which groups a step draws from, which of their images it looks at, and how much a group counts.

All of it is a function of labels, seed and step: nothing is remembered, so a resumed run and any number of processes choose
alike. With the defaults every group and image is used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from diffalign.config import TrainConfig
from diffalign.data.choose_members import choose_members
from diffalign.draws import draw
from diffalign.errors import DiffalignError
from diffalign.objectives import GroupErrors, has_preference, label_range, labelled_count, ranking
from diffalign.training.order import BucketOrder
from diffalign.training.preference.draws import Draws
from diffalign.training.protocols import GroupSource


def phase_of(step: int, steps: int, phases: int) -> tuple[int, int]:
    """Return the phase (from 0) that a step falls into, and the phase's first step; phases are equally long."""
    phase = min(step * phases // steps, phases - 1)
    return phase, -(-phase * steps // phases)


def easiest(gaps: np.ndarray, phase: int, phases: int) -> np.ndarray:
    """Return the groups to draw from, ascending: the (phase + 1) / phases of them whose labels lie farthest apart.

    Curry-DPO (arXiv 2403.07230) goes from pairs that are easy to tell apart to close ones. Here the easy ones stay in
    (ours), so nothing is unlearnt. gaps [N]; equal gaps in their order; the last phase has all.
    """
    count = math.ceil(len(gaps) * (phase + 1) / phases)
    return np.sort(np.argsort(-gaps, kind="stable")[:count])


def relaxed(first: int, last: int, step: int, steps: int) -> int:
    """Return how many images of a group to use: linear from `first` to `last` over the run (D3S, arXiv 2509.22115)."""
    progress = step / max(steps - 1, 1)
    return round((1 - progress) * first + progress * last)


def filled(chosen: np.ndarray, size: int, members: int) -> np.ndarray:
    """Return the positions `chosen` and, where they are fewer than `size`, others below `members`, ascending.

    Groups of a micro-batch have equally many; the others have no label, so no objective gets to see them.
    """
    others = np.setdiff1d(np.arange(members), chosen)
    return np.sort(np.concatenate([chosen, others[: size - len(chosen)]]))


def loser_by_rank(ranked: Tensor, phase: int, phases: int, counts: Tensor | None = None) -> Tensor:
    """Choose the image that is compared with the best one by its place: the last in the first phase, then closer ones. [B, 1]

    ranked [B, K]: images from best to worst. counts [B]: how many of each group have a label, the first ones; None: all.
    Curry-DPO's curriculum by rank; its pairs, too, all hold the best image.
    """
    k = torch.full((len(ranked),), ranked.shape[1]) if counts is None else counts
    place = k - 1 - ((k - 2).double() * phase / max(phases - 1, 1)).round().long()
    return ranked.gather(1, place.clamp_min(0)[:, None])


def loser_by_score(ranked: Tensor, labels: Tensor, phase: int, phases: int) -> Tensor:
    """Choose the image whose label's distance from the best is nearest to a falling share of the group's gap. [B, 1]

    Only images strictly below the best one are eligible; where there is none, the last one with a label is chosen.
    """
    ordered = labels.gather(1, ranked)
    gap = ordered[:, :1] - ordered
    last = (labelled_count(labels) - 1).clamp_min(0)[:, None]
    wanted = (1 - phase / max(phases - 1, 1)) * gap.gather(1, last)
    distance = (gap - wanted).abs().masked_fill(~(gap > 0), math.inf)
    largest = torch.finfo(distance.dtype).max
    distance = distance.scatter(1, last, distance.gather(1, last).clamp(max=largest))
    return ranked.gather(1, distance.argmin(dim=1, keepdim=True))


def weights_by_gap(gaps: np.ndarray, strength: float) -> np.ndarray:
    """Return the weight of each group, mean 1: close labels count more, clear ones less.

    Ours: 1 + strength (1 - 2 Phi(z)) with z the gap's z-score over the dataset. DA-DPO (arXiv 2601.00623) also looks at how
    hard pairs are to tell apart, but puts its strength inside the sigmoid and gives more of it to clear pairs (`strength:
    gap` of dpo).
    """
    spread = gaps.std()
    z = (gaps - gaps.mean()) / spread if spread > 0 else np.zeros(len(gaps))
    weights = np.array([1 - strength * math.erf(v / math.sqrt(2)) for v in z])
    return weights / weights.mean()


def weights_by_mean(means: np.ndarray, temperature: float) -> np.ndarray:
    """Return the weight of each group, mean 1: prompts with a low mean reward count more, N softmax(-mean / temperature).

    MathForge's difficulty weights (arXiv 2601.20614), over the dataset instead of a batch. For rewards in [0, 1] and
    temperature 2 the largest is at most e^0.5 = 1.65 times the smallest.
    """
    powers = np.exp(-(means - means.min()) / temperature)
    return np.asarray(powers / powers.mean())


def group_weights(config: TrainConfig, labels: Tensor, known: Tensor, gaps: np.ndarray) -> Tensor:
    """Return the weight of each group, [N] float32, by `selection.weight`; 1 for groups without a preference.

    labels [N, K] float64; known [N]: which groups state a preference; gaps [N]: best less worst label.
    """
    section, weights, rated = config.selection, np.ones(len(gaps)), known.numpy()
    if section.weight != "none" and rated.any():
        if section.weight == "gap":
            weights[rated] = weights_by_gap(gaps[rated], section.strength)
        else:
            weights[rated] = weights_by_mean(labels.nanmean(1).numpy()[rated], section.temperature)
    return torch.from_numpy(weights).float()


Pool = tuple[np.ndarray, BucketOrder]
"""Groups to draw from, ascending, and their order."""


@dataclass(frozen=True)
class Selection:
    """The groups and images that a run trains on. pools: one for each phase; weights [N] float32: of the groups."""

    config: TrainConfig
    pools: list[Pool]
    weights: Tensor

    @classmethod
    def of(cls, config: TrainConfig, source: GroupSource) -> Selection:
        """Choose for a source of groups, whose `rewards` and `mask` are read only where something is chosen.

        Raises DiffalignError where all groups have too few images.
        """
        section, train, buckets = config.selection, config.train, np.asarray(source.buckets)

        def ordered(pool: np.ndarray) -> Pool:
            order = BucketOrder(buckets[pool].tolist(), train.micro_batch, train.groups_per_step, config.seed)
            return pool, order

        everything = [ordered(np.arange(len(source)))]
        if section.groups == "all" and section.weight == "none" and section.sizes is None:
            return cls(config, everything, torch.ones(len(source)))
        labels = source.rewards.double()
        labels = labels.masked_fill(~labels.isfinite(), math.nan)
        if section.sizes is not None and max(section.sizes) > labels.shape[1]:
            raise DiffalignError(
                f"selection.sizes={list(section.sizes)}: the groups have {labels.shape[1]} images; use at most that many"
            )
        # gaps: best less worst label of each group, -1 where a group states no preference; without a label, no member
        known = has_preference(labels, source.mask)
        high, low = label_range(labels)
        gaps = torch.where(known, high - low, torch.tensor(-1.0, dtype=labels.dtype)).numpy()
        pools = everything
        if section.groups != "all":
            pools = [ordered(easiest(gaps, phase, section.phases)) for phase in range(section.phases)]
        return cls(config, pools, group_weights(config, labels, known, gaps))

    def groups(self, step: int) -> list[int]:
        """Return the groups of a step."""
        phase, first = phase_of(step, self.config.train.steps, len(self.pools))
        pool, order = self.pools[phase]
        return [int(pool[i]) for i in order.step(step - first)]

    def narrow(self, draws: Draws, labels: Tensor, step: int, slots: list[int], group_ids: list[str]) -> Draws:
        """Restrict draws to the images that the step looks at; labels [B, K], NaN where there is none."""
        section, steps = self.config.selection, self.config.train.steps
        if section.images == "all":
            return draws
        if section.images == "variance":
            assert section.sizes is not None  # the config is checked
            size, seed = relaxed(*section.sizes, step, steps), self.config.seed
            draws_of = partial(draw, seed, "selection", step=step)
            chosen = [
                filled(choose_members(row, "variance", size, draws_of(inner=slot, group=group)), size, len(row))
                for row, slot, group in zip(labels.double().numpy(), slots, group_ids, strict=True)
            ]
            return replace(draws, members=torch.from_numpy(np.stack(chosen)))
        ranked = ranking(GroupErrors(labels, rewards=labels, order=draws.order))
        phase, _ = phase_of(step, steps, section.phases)
        if section.images == "rank_gap":
            loser = loser_by_rank(ranked, phase, section.phases, labelled_count(labels))
        else:
            loser = loser_by_score(ranked, labels, phase, section.phases)
        return replace(draws, members=torch.cat([ranked[:, :1], loser], dim=1).sort(dim=1).values)
