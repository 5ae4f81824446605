"""RankDPO (Karthik et al., arXiv 2410.18013): every preferred pair of a ranked group, weighted as in LambdaLoss."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from diffalign.objectives.base import (
    Charts,
    GroupErrors,
    LabelKind,
    Members,
    Objective,
    ObjectiveOutput,
    best_and_worst,
    logsigmoid,
    ranking,
)
from diffalign.objectives.dpo import MARGIN_CHARTS

if TYPE_CHECKING:
    from torch import Tensor

RankedBy = Literal["labels", "model"]
PairWeight = Literal["delta", "gain", "none"]


def inverse_discounts(group: GroupErrors, ranked_by: RankedBy = "labels") -> Tensor:
    """Return 1 / ln(1 + rank) of every image, [B, K]; rank 1 is the best.

    By labels, images of equal label get the mean over the ranks that they share. A preferred pair is never
    tied, so its weight is linear in these values, and the mean is the exact expectation over random orders of the ties.
    By the model, the ranks are those of the policy's own errors, lowest first (LiPO-lambda, arXiv 2402.01878). There,
    ties are broken by `order` instead: before the first update all images are tied, and shared ranks would keep every
    weight, and with it the gradient, at 0.
    """
    import torch

    labels = group.labels
    by_rank = 1.0 / torch.arange(2, labels.shape[1] + 2, dtype=labels.dtype, device=labels.device).log()
    if ranked_by == "model":
        group = GroupErrors(group.policy_error, rewards=-group.error_difference.detach(), order=group.order)
    places = ranking(group).argsort(dim=1)  # place of every image, 0 is the best
    values = by_rank[places]
    if ranked_by == "model":
        return values
    tied = (labels[:, :, None] == labels[:, None, :]).to(values.dtype)
    return (tied * values[:, None, :]).sum(2) / tied.sum(2)


def pair_weights(group: GroupErrors, kind: PairWeight = "delta", ranked_by: RankedBy = "labels") -> Tensor:
    """Return the weights of "image i is better than image j", [B, K, K]; 0 unless label i is strictly higher.

    An image without a label (NaN) is in no pair.

    `delta`: |G_i - G_j| |1/D_i - 1/D_j| with gain G = 2^label - 1 and discount D = ln(1 + rank) (equation 6). `gain`:
    the first factor alone. `none`: 1, which is Diffusion-DPO on all pairs.
    """
    labels = group.labels
    better = (labels[:, :, None] > labels[:, None, :]).to(group.policy_error.dtype)
    if kind == "none":
        return better
    gain = labels.exp2() - 1
    weights = (gain[:, :, None] - gain[:, None, :]).abs()
    if kind == "delta":
        inverse = inverse_discounts(group, ranked_by)
        weights = weights * (inverse[:, :, None] - inverse[:, None, :]).abs()
    return (better * weights).masked_fill(better == 0, 0.0)


@dataclass(frozen=True)
class RankDPO(Objective):
    """Sum over pairs with i better than j of weight_ij (-log sigmoid(-beta (d_i - d_j))), equation 7.

    Labels are vote shares phi in [0, 1]; the rank behind the weights is that of phi, so they are constants of the data.
    Pairs are summed, not averaged, and not divided by the weights' sum: a prompt on which the votes disagree should
    count less. There is no 1/2 before beta, so beta here equals 2 beta in Diffusion-DPO, and the default is
    Diffusion-DPO's 5000 for SDXL. The paper names no beta; it writes summed squared errors, here they are means.

    All images of a group share the time, as in the paper. The paper leaves open whether they share the noise, and which
    logarithm is meant (another base only scales the loss). `ranked_by="model"` takes LiPO's ranks, those of the policy
    itself: the paper's text mentions them, its algorithm does not. `pair_weight` gives the rows of the paper's Table 5.

    At policy = reference the loss is log 2 times the sum of the weights, and its gradient is not zero.
    """

    beta: float = field(
        default=2500.0,
        metadata={
            "gt": 0,
            "description": "strength of the pull to the reference, for mean errors and without the factor 1/2: half of "
            "Diffusion-DPO's beta",
        },
    )
    pair_weight: PairWeight = field(
        default="delta",
        metadata={
            "description": "delta: gain times discount, as the paper; gain: without discount; none: all pairs alike"
        },
    )
    ranked_by: RankedBy = field(
        default="labels",
        metadata={"description": "whose ranks the discount takes; model: the policy's own, as LiPO has it"},
    )

    title: ClassVar[str] = "RankDPO; labels are vote shares in [0, 1]"
    needs_reference: ClassVar[bool] = True
    needs_gap: ClassVar[bool] = False
    label_kind: ClassVar[LabelKind] = "vote_share"
    members: ClassVar[Members] = "all"
    charts: ClassVar[Charts] = {
        **MARGIN_CHARTS,
        "loss_at_reference": (
            "Loss at the reference",
            "log 2 times the pairs' weights; the loss below it is what is learnt",
        ),
        "implicit_spread": ("Spread of the implicit reward", "deviation of beta d within a group"),
    }

    def __call__(self, group: GroupErrors) -> ObjectiveOutput:
        d = group.error_difference
        weights = pair_weights(group, self.pair_weight, self.ranked_by)
        margins = -self.beta * (d[:, :, None] - d[:, None, :])
        loss = (weights * -logsigmoid(margins)).sum(dim=(1, 2))
        return ObjectiveOutput(loss, self._metrics(group, d.detach(), weights, margins.detach()))

    def _metrics(self, group: GroupErrors, d: Tensor, weights: Tensor, margins: Tensor) -> dict[str, Tensor]:
        preferred = pair_weights(group, "none")
        pairs = preferred.sum(dim=(1, 2)).clamp_min(1)
        best, worst = best_and_worst(group)
        return {
            "margin": (preferred * margins).sum(dim=(1, 2)) / pairs,
            # A margin of exactly 0 (policy = reference) is neither right nor wrong.
            "accuracy": (preferred * 0.5 * (margins.sign() + 1)).sum(dim=(1, 2)) / pairs,
            "winner_gap": d.gather(1, best).squeeze(1),
            "loser_gap": d.gather(1, worst).squeeze(1),
            "implicit_spread": self.beta * d.std(dim=1, unbiased=False),
            "weight_sum": weights.sum(dim=(1, 2)),
            # What the loss would be at policy = reference; below it, the ranking is being learnt.
            "loss_at_reference": math.log(2) * weights.sum(dim=(1, 2)),
        }
