"""GDRO (Wang et al., arXiv 2601.02036): listwise cross-entropy between the implicit reward and the explicit one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from diffalign.objectives.base import (
    Charts,
    GroupErrors,
    LabelKind,
    Members,
    Objective,
    ObjectiveOutput,
    all_labels,
    ranking,
)
from diffalign.objectives.dpo import MARGIN_CHARTS
from diffalign.objectives.group_metrics import order_metrics

if TYPE_CHECKING:
    from torch import Tensor


def place_losses(implicit: Tensor, rewards: Tensor, tau: float) -> Tensor:
    """Return a cross-entropy for every place, [B, K]; both inputs [B, K] are sorted from best to worst (equation 7).

    At place i, without the better images: log sum_{m >= i} exp(s_m) - sum_{j >= i} q_i(j) s_j, where q_i is the softmax
    of the remaining r / tau. tau = 0 puts all of q_i on image i, which is the Plackett-Luce likelihood (equation 12).
    At the last place it is 0.
    """
    import torch

    k = implicit.shape[1]
    gone = torch.ones(k, k, dtype=torch.bool, device=implicit.device).tril(-1)  # [place, image]
    remaining = implicit[:, None, :].expand(-1, k, -1).masked_fill(gone, float("-inf"))
    if tau == 0:
        wanted = implicit
    else:
        target = (rewards / tau)[:, None, :].expand(-1, k, -1).masked_fill(gone, float("-inf")).softmax(dim=2)
        wanted = (target * implicit[:, None, :]).sum(2)
    return remaining.logsumexp(dim=2) - wanted


def listwise_loss(implicit: Tensor, rewards: Tensor, tau: float) -> Tensor:
    """Return the sum of `place_losses` over places, [B]. The last place follows from the others and has no term."""
    return place_losses(implicit, rewards, tau)[:, :-1].sum(1)


@dataclass(frozen=True)
class GDRO(Objective):
    """The listwise loss of s = -beta d, plus gamma times the policy's error on the best image.

    Rewards enter the target as they are, neither centred nor scaled by group, so tau belongs to their scale:
    0.05 is the paper's for rewards in [0, 1]. beta is T times the KL's, as in the paper; whether it sums or averages
    the squared error is not stated there. Here it is a mean, for d and for the last term alike. Set beta by the metric
    `implicit_spread`: about 0.3 to 3. Below, the softmax stays flat; above, it saturates.

    Images of equal reward leave the list in the order of `order`, drawn again in every step: the loss depends on it, and
    a fixed order would push equal images apart. The loss grows with the number of places; compare settings at one k.

    At policy = reference s is 0 and the gradient is not: the pull on the best image is weaker than the push on the worst,
    and the gamma term balances that. A group whose rewards are all equal still has a loss, which evens out
    its s; the trainer gives such groups no weight.
    """

    beta: float = field(
        default=12.0,
        metadata={
            "gt": 0,
            "description": "scale of the implicit reward, for mean errors; set it so that implicit_spread in the metrics "
            "reaches about 0.3 to 3",
        },
    )
    tau: float = field(
        default=0.05,
        metadata={
            "ge": 0,
            "description": "temperature of the explicit rewards, in their unit; 0: ranks only (Plackett-Luce)",
        },
    )
    gamma: float = field(
        default=0.5, metadata={"ge": 0, "description": "weight of the policy's error on the best image of the group"}
    )

    title: ClassVar[str] = "GDRO"
    needs_reference: ClassVar[bool] = True
    needs_gap: ClassVar[bool] = False
    label_kind: ClassVar[LabelKind] = "score"
    members: ClassVar[Members] = "all"
    charts: ClassVar[Charts] = {
        **MARGIN_CHARTS,
        "listwise": ("Listwise loss", "cross-entropy of implicit and explicit reward, summed over places"),
        "implicit_spread": ("Spread of the implicit reward", "deviation of beta d within a group; for GDRO 0.3 to 3"),
        "reward_spread": ("Spread of the labels", "deviation within a group"),
        "winner_error": ("Winner's error", "mean squared"),
    }

    def __call__(self, group: GroupErrors) -> ObjectiveOutput:
        ranked = ranking(group)
        d = group.error_difference.gather(1, ranked)
        implicit, rewards = -self.beta * d, all_labels(group).gather(1, ranked)
        listwise = listwise_loss(implicit, rewards, self.tau)
        best = group.policy_error.gather(1, ranked[:, :1]).squeeze(1)
        metrics = {
            "listwise": listwise,
            **order_metrics(group, self.beta),
            "winner_error": best,
            "implicit_spread": implicit.std(dim=1, unbiased=False),
            "reward_spread": rewards.std(dim=1, unbiased=False),
        }
        return ObjectiveOutput(listwise + self.gamma * best, metrics)
