"""Metrics of losses over whole groups: how far the policy's order of the images agrees with the labels'."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffalign.objectives.base import GroupErrors, ranking

if TYPE_CHECKING:
    from torch import Tensor


def order_metrics(group: GroupErrors, beta: float = 1.0) -> dict[str, Tensor]:
    """Return metrics of s = -beta d, [B] each: `margin` of best and worst, `accuracy` over pairs, and both ends' gaps.

    A pair counts where its labels differ. s equal in a pair is neither right nor wrong, as before the first update.
    """
    ranked = ranking(group)
    d, rewards = group.error_difference.gather(1, ranked), group.labels.gather(1, ranked)
    implicit = -beta * d
    better = (rewards[:, :, None] > rewards[:, None, :]).to(d.dtype)
    margins = implicit[:, :, None] - implicit[:, None, :]
    pairs = better.sum(dim=(1, 2)).clamp_min(1)
    return {
        "margin": implicit[:, 0] - implicit[:, -1],
        "accuracy": (better * 0.5 * (margins.sign() + 1)).sum(dim=(1, 2)) / pairs,
        "winner_gap": d[:, 0],
        "loser_gap": d[:, -1],
    }
