"""Diffusion-DPO (Wallace et al., arXiv 2311.12908), in the convention of the authors' code."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from diffalign.objectives.base import (
    BETA_END,
    Charts,
    GroupErrors,
    LabelKind,
    Members,
    Objective,
    ObjectiveOutput,
    best_and_worst,
    logsigmoid,
)

if TYPE_CHECKING:
    from torch import Tensor

MARGIN_CHARTS: Charts = {
    "margin": ("Margin", "inside of the log-sigmoid; above 0 the policy prefers the winner"),
    "accuracy": ("Implicit accuracy", "share of groups with a margin above 0"),
    "winner_gap": ("Winner's error against the reference", "should stay near 0 or fall"),
    "loser_gap": ("Loser's error against the reference", "may rise, but should not run away from the winner's"),
}
PAIR_CHARTS: Charts = {
    **MARGIN_CHARTS,
    "gradient_factor": ("Gradient factor", "sigmoid(-margin): near 0 nothing is learnt any more"),
}
"""The metrics of `pair_loss`."""


def pair_loss(
    group: GroupErrors,
    strength: float | Tensor,
    loser_weight: float = 1.0,
    margin_clamp: float | None = None,
    anchor: float = 0.0,
    offset: float = 0.0,
) -> ObjectiveOutput:
    """Return -log sigmoid(-strength (d_w - d_l) - offset) of the best and the worst image; `strength` is a number or [B].

    `loser_weight`, `margin_clamp`, `anchor` and `offset` are those of `DiffusionDPO`.
    """
    d = group.error_difference
    best, worst = best_and_worst(group)
    d_w, d_l = d.gather(1, best).squeeze(1), d.gather(1, worst).squeeze(1)
    margin = -strength * (d_w - loser_weight * d_l)
    pulled = margin if margin_clamp is None else margin.clamp(max=margin_clamp)
    metrics = {
        "margin": margin,
        # A margin of exactly 0 (policy = reference) is neither right nor wrong.
        "accuracy": 0.5 * (margin.sign() + 1),
        "winner_gap": d_w,
        "loser_gap": d_l,
        "gradient_factor": (offset - margin).sigmoid(),
    }
    anchored = anchor * group.policy_error.gather(1, best).squeeze(1) if anchor else 0.0
    return ObjectiveOutput(-logsigmoid(pulled - offset) + anchored, metrics)


def label_gap(group: GroupErrors) -> Tensor:
    """Return the label of the best image less that of the worst, [B]."""
    best, worst = best_and_worst(group)
    return (group.labels.gather(1, best) - group.labels.gather(1, worst)).squeeze(1)


@dataclass(frozen=True)
class DiffusionDPO(Objective):
    """-log sigmoid(-beta / 2 (d_w - d_l)), with d = policy error - reference error.

    w and l are the best and the worst image of the group. The paper's equation 14 has beta T omega in front and sums the
    squared error; the authors' code has beta / 2 and the mean over the latent's elements, as here. The published betas (2000
    for SD1.5, 5000 for SDXL) belong to that form. With the mean, a fixed beta means a weaker tie to the reference per latent
    element at a higher resolution. For flow models the errors are those of the velocity, with a constant beta, as Flow-DPO
    (arXiv 2501.13918) recommends over beta (1 - t)^2.

    At policy = reference the loss is log 2 and its gradient is not zero.

    Three remedies for runs that unlearn both images, none of them in the paper and all off by default: `loser_weight` < 1
    multiplies d_l, so that the loser cannot carry the margin alone; `margin_clamp` stops the pull at this margin; `anchor`
    adds the policy's error on the winner with this weight (as GDRO's stabiliser does).

    Two forms from papers, off by default as well. `strength: gap` multiplies beta by `strength_scale` (|Delta| + 1), Delta the
    difference of the two labels: the released form of DA-DPO (arXiv 2601.00623), whose Delta is the margin of a frozen scorer.
    Clear pairs pull harder at first and are done sooner. `offset` is the margin by which the policy must prefer the winner,
    -log sigmoid(margin - offset): the loss of constrained preference optimisation (arXiv 2605.20834) with a constant in the
    place of gamma (1 / p_w + 1 / p_l), which a squared error does not have. It is meant for pairs whose loser the reference
    prefers, where Diffusion-DPO's optimum may do so, too.
    """

    beta: float = field(
        default=2000.0,
        metadata={
            "gt": 0,
            "description": "strength of the pull to the reference; belongs to errors that are a mean over the latent's "
            "elements, with the factor 1/2 of the paper's code. Larger stays nearer to the reference",
        },
    )
    loser_weight: float = field(
        default=1.0,
        metadata={
            "ge": 0,
            "le": 1,
            "description": "below 1 the loser's error counts less, so it cannot carry the margin alone",
        },
    )
    margin_clamp: float | None = field(
        default=None, metadata={"gt": 0, "description": "a margin above this pulls no further; null: no bound"}
    )
    anchor: float = field(
        default=0.0, metadata={"ge": 0, "description": "weight of the policy's error on the winner; 0: none"}
    )
    offset: float = field(
        default=0.0,
        metadata={"ge": 0, "description": "margin by which the policy must prefer the winner; 0: Diffusion-DPO"},
    )
    strength: Literal["none", "gap"] = field(
        default="none",
        metadata={
            "description": "gap: beta times strength_scale (difference of the labels + 1), as DA-DPO; none: beta"
        },
    )
    strength_scale: float = field(default=1.0, metadata={"gt": 0, "description": "of strength=gap"})
    beta_end: float | None = field(default=None, metadata={"gt": 0, "description": BETA_END})

    title: ClassVar[str] = "Diffusion-DPO"
    needs_reference: ClassVar[bool] = True
    needs_gap: ClassVar[bool] = False
    label_kind: ClassVar[LabelKind] = "score"
    members: ClassVar[Members] = "best_worst"
    single_margin: ClassVar[bool] = True
    charts: ClassVar[Charts] = PAIR_CHARTS

    def __call__(self, group: GroupErrors) -> ObjectiveOutput:
        strength: float | Tensor = 0.5 * self.beta
        if self.strength == "gap":
            strength = strength * self.strength_scale * (label_gap(group).abs() + 1)
        return pair_loss(group, strength, self.loser_weight, self.margin_clamp, self.anchor, self.offset)
