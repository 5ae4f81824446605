"""MADPO (Rho, arXiv 2510.05342): Diffusion-DPO, each pair weighted by how far apart a reward puts its two images."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from diffalign.objectives.base import (
    BETA,
    Charts,
    GroupErrors,
    LabelKind,
    Members,
    Objective,
    ObjectiveOutput,
    best_and_worst,
)
from diffalign.objectives.dpo import PAIR_CHARTS, pair_loss

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class MADPO(Objective):
    """w(h) (-log sigmoid(-beta / 2 (d_w - d_l))), h = (r_w - r_l) / reward_scale the reward's own margin.

    The paper's loss is a fixed weight of h times DPO's, chosen so that the policy's optimal margin is larger than
    the reward's for hard pairs (h near 0) and smaller for easy ones. Its exact weight could not be confirmed; this one
    follows from that statement. Where image i beats j with probability sigmoid(h), weighted DPO is minimal at the margin
    h + log(w(h) / w(-h)), which for

        w(h) = sigmoid(a h) / sigmoid(h),   a = easy + (hard - easy) exp(-|h|),

    is a h: `hard` times the reward's margin where it is small, `easy` times where it is large. hard = easy = 1 is
    Diffusion-DPO. reward_scale brings scores to log-odds: the difference of scores at which the better image would win
    about 73 of 100 comparisons.

    Here the score also decides the winner, so h >= 0 and no pair occurs in the other order. Then w only distributes the
    gradient: it lies in (1/2, 2), is 1 for h = 0, above 1 for close pairs and below 1 for clear ones. SmPO, which puts
    h inside the log-sigmoid, does the opposite with close pairs: they get almost no gradient.
    """

    beta: float = field(default=2000.0, metadata={"gt": 0, "description": BETA})
    hard: float = field(
        default=4.0,
        metadata={"gt": 0, "description": "the optimal margin, in units of the reward's, where scores are close"},
    )
    easy: float = field(default=0.5, metadata={"gt": 0, "description": "the same where scores are far apart"})
    reward_scale: float = field(
        default=1.0,
        metadata={
            "gt": 0,
            "description": "difference of scores at which the better image would win about 73 of 100 comparisons",
        },
    )

    title: ClassVar[str] = "MADPO, margin-adaptive"
    needs_reference: ClassVar[bool] = True
    needs_gap: ClassVar[bool] = False
    label_kind: ClassVar[LabelKind] = "score"
    members: ClassVar[Members] = "best_worst"
    charts: ClassVar[Charts] = {
        **PAIR_CHARTS,
        "pair_weight": ("Weight of a pair", "above 1 for close scores, below for clear ones"),
    }

    def weight(self, h: Tensor) -> Tensor:
        """Return w(h), elementwise."""
        factor = self.easy + (self.hard - self.easy) * (-h.abs()).exp()
        return (factor * h).sigmoid() / h.sigmoid()

    def __call__(self, group: GroupErrors) -> ObjectiveOutput:
        best, worst = best_and_worst(group)
        h = (group.labels.gather(1, best) - group.labels.gather(1, worst)).squeeze(1) / self.reward_scale
        weight = self.weight(h)
        output = pair_loss(group, 0.5 * self.beta)
        return ObjectiveOutput(weight * output.loss, {**output.metrics, "pair_weight": weight})
