"""MADPO (Rho, arXiv 2510.05342): Diffusion-DPO, each pair weighted by how far apart a reward puts its two images."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from diffalign.objectives.base import BETA, Charts, GroupErrors, LabelKind, Members, Objective, ObjectiveOutput
from diffalign.objectives.dpo import PAIR_CHARTS, label_gap, pair_loss

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class MADPO(Objective):
    """w(h) (-log sigmoid(-beta / 2 (d_w - d_l))), h = (r_w - r_l) / reward_scale the reward's own margin.

    The loss is a fixed weight of h times DPO's. Where image i beats j with probability sigmoid(h), weighted DPO is minimal at
    the margin h + log(w(h) / w(-h)), which for w(h) = sigmoid(c h) / sigmoid(h) is c h: `hard` times the reward's margin
    where it is small, `easy` times where it is large.

    `shape: released` is the authors' code: c falls from `hard` to `easy` by a logistic curve of |h|,

        c(h) = easy + (hard - easy) / (1 + (hard - 1) / (1 - easy) exp(slope (|h| - turn))),

    which is 1 at |h| = turn, and w is 1 for h <= -turn. Its values are 2, 0.5, slope 1; turn is 2 in the class and ln 999
    in a notebook. `shape: exponential` is ours, from before the code was there: c = easy + (hard - easy) exp(-|h|).

    reward_scale brings scores to log-odds: the difference of scores at which the better image would win about 73 of 100
    comparisons. hard = easy = 1 is Diffusion-DPO.

    Here the score also decides the winner, so h >= 0 and no pair occurs in the other order. Then w only distributes the
    gradient: it lies in (1/2, 2), is 1 for h = 0, above 1 for close pairs and below 1 for clear ones. SmPO, which puts
    h inside the log-sigmoid, does the opposite with close pairs: they get almost no gradient.

    Raises ValueError where shape is released and 1 does not lie between `easy` and `hard`.
    """

    beta: float = field(default=2000.0, metadata={"gt": 0, "description": BETA})
    shape: Literal["released", "exponential"] = field(
        default="released",
        metadata={
            "description": "how the weight depends on the reward's margin; released: the authors' code; exponential: ours, "
            "which had hard 4",
            "formerly": "exponential",
        },
    )
    hard: float = field(
        default=2.0,
        metadata={"gt": 0, "description": "the optimal margin, in units of the reward's, where scores are close"},
    )
    easy: float = field(default=0.5, metadata={"gt": 0, "description": "the same where scores are far apart"})
    slope: float = field(
        default=1.0, metadata={"gt": 0, "description": "how fast hard turns into easy (shape released)"}
    )
    turn: float = field(
        default=2.0,
        metadata={"ge": 0, "description": "the reward's margin at which a pair is neither (shape released)"},
    )
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

    def __post_init__(self) -> None:
        if self.shape == "released" and not self.easy <= 1 <= self.hard:
            raise ValueError(
                f"shape=released needs easy <= 1 <= hard, not easy={self.easy:g} and hard={self.hard:g}; shape=exponential "
                "takes any"
            )

    def factor(self, h: Tensor) -> Tensor:
        """Return c(h), elementwise: the optimal margin in units of the reward's."""
        if self.shape == "exponential":
            return self.easy + (self.hard - self.easy) * (-h.abs()).exp()
        if 1.0 in (self.hard, self.easy):  # the limit, where the fraction may be 0 / 0
            return h.new_ones(()).expand_as(h)
        grown = (self.hard - 1) / (1 - self.easy) * (self.slope * (h.abs() - self.turn)).exp()
        return self.easy + (self.hard - self.easy) / (1 + grown)

    def weight(self, h: Tensor) -> Tensor:
        """Return w(h), elementwise."""
        found = (self.factor(h) * h).sigmoid() / h.sigmoid()
        return found if self.shape == "exponential" else found.where(h > -self.turn, found.new_ones(()))

    def __call__(self, group: GroupErrors) -> ObjectiveOutput:
        weight = self.weight(label_gap(group) / self.reward_scale)
        output = pair_loss(group, 0.5 * self.beta)
        return ObjectiveOutput(weight * output.loss, {**output.metrics, "pair_weight": weight})
