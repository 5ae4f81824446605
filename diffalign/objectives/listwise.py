"""The listwise loss of in-context ranking preference optimisation (IRPO, arXiv 2504.15477), for diffusion models."""

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
    all_labels,
    ranking,
)
from diffalign.objectives.dpo import MARGIN_CHARTS
from diffalign.objectives.gdro import place_losses
from diffalign.objectives.group_metrics import order_metrics
from diffalign.objectives.rankdpo import inverse_discounts

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Listwise(Objective):
    """Sum over images of w_i (-log p_i), p_i the softmax of s = -beta d, w_i = (2^label_i - 1) / log2(1 + rank_i).

    Graded labels and the weights of NDCG, as the authors state them; beta 1 there belongs to log-likelihoods of texts, ours to
    mean errors. Whether the softmax of an image is over `all` images or over those that are not placed yet (`remaining`, a
    weighted Plackett-Luce likelihood) could not be confirmed; both are here. Do not confuse it with iterative *reasoning*
    preference optimisation (arXiv 2404.19733), which has the same initials.

    Images of equal label share the mean of their ranks' discounts, which is the mean over orders of the ties; in `remaining`
    the loss itself depends on their order, so they follow `order`, which is drawn again in every step.

    `remaining` without gain and discount is GDRO's loss with tau = 0 and gamma = 0. At policy = reference s is 0 and the
    gradient is not. Raises ValueError where an image has no label.
    """

    beta: float = field(
        default=12.0,
        metadata={
            "gt": 0,
            "description": "scale of the implicit reward, for mean errors; set it so that implicit_spread in the metrics "
            "reaches about 0.3 to 3",
        },
    )
    over: Literal["all", "remaining"] = field(
        default="all",
        metadata={"description": "what an image is compared with: all of the group, or those not better than it"},
    )
    gain: Literal["exponential", "linear", "none"] = field(
        default="exponential", metadata={"description": "of a label: 2^label - 1, the label, or 1"}
    )
    discount: Literal["log2", "none"] = field(
        default="log2", metadata={"description": "of a rank: log2(1 + rank), or none"}
    )

    title: ClassVar[str] = "listwise with NDCG's weights; labels in [0, 1]"
    needs_reference: ClassVar[bool] = True
    needs_gap: ClassVar[bool] = False
    label_kind: ClassVar[LabelKind] = "vote_share"
    members: ClassVar[Members] = "all"
    charts: ClassVar[Charts] = {
        **MARGIN_CHARTS,
        "implicit_spread": ("Spread of the implicit reward", "deviation of beta d within a group; 0.3 to 3"),
        "weight_sum": ("Sum of the weights", "of a group's images"),
    }

    def weights(self, group: GroupErrors) -> Tensor:
        """Return w, [B, K], in the order of the group's images."""
        import torch

        labels = all_labels(group)
        gain = {"exponential": labels.exp2() - 1, "linear": labels, "none": torch.ones_like(labels)}[self.gain]
        if self.discount == "none":
            return gain
        if self.over == "all":
            return gain * math.log(2) * inverse_discounts(group)
        places = ranking(group).argsort(dim=1)
        return gain / (places + 2).to(gain.dtype).log2()

    def __call__(self, group: GroupErrors) -> ObjectiveOutput:
        weights, implicit = self.weights(group), -self.beta * group.error_difference
        if self.over == "all":
            loss = -(weights * implicit.log_softmax(dim=1)).sum(1)
        else:
            ranked = ranking(group)
            terms = place_losses(implicit.gather(1, ranked), group.labels.gather(1, ranked), 0.0)
            loss = (weights.gather(1, ranked) * terms).sum(1)
        metrics = {
            **order_metrics(group, self.beta),
            "implicit_spread": implicit.std(dim=1, unbiased=False),
            "weight_sum": weights.sum(1),
        }
        return ObjectiveOutput(loss, metrics)
