"""Linear-DPO (arXiv 2605.21123): Diffusion-DPO whose sigmoid is a clamped straight line, taken without a gradient."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from diffalign.objectives.base import (
    Charts,
    GroupErrors,
    LabelKind,
    Members,
    Objective,
    ObjectiveOutput,
    best_and_worst,
)
from diffalign.objectives.dpo import PAIR_CHARTS, pair_loss


@dataclass(frozen=True)
class LinearDPO(Objective):
    """w (e_w - e_l), w = clamp(1/2 + slope beta (d_w - d_l), floor, 1 - floor) without gradient.

    As the authors' code has it (slope 0.2). The gradient is Diffusion-DPO's with this line in the place of the sigmoid, and
    without the factor beta / 2 before it, so learning rates do not carry over. Unlike the sigmoid's, the pull ends: with
    floor 0 a pair with a margin of beta / 2 (d_l - d_w) = 1 / (4 slope) or more has none. The loss is a difference of errors:
    it may be negative and says nothing by itself. The authors' reference is an average of the policy for SD1.5
    (`tune.reference: ema`).
    """

    beta: float = field(
        default=500.0,
        metadata={"gt": 0, "description": "how soon the pull ends; the code has 100 for SD1.5 and 500 for SDXL"},
    )
    slope: float = field(
        default=0.2, metadata={"gt": 0, "description": "of the line, in units of beta (d_w - d_l); the code's"}
    )
    floor: float = field(
        default=0.0,
        metadata={"ge": 0, "lt": 0.5, "description": "the least pull of any pair; the code has 0.001 for SD1.5"},
    )

    title: ClassVar[str] = "Linear-DPO"
    needs_reference: ClassVar[bool] = True
    needs_gap: ClassVar[bool] = False
    label_kind: ClassVar[LabelKind] = "score"
    members: ClassVar[Members] = "best_worst"
    charts: ClassVar[Charts] = {
        **PAIR_CHARTS,
        "gradient_factor": ("Gradient factor", "weight of the pair, 1/2 at first; 0: nothing more is learnt"),
    }

    def __call__(self, group: GroupErrors) -> ObjectiveOutput:
        metrics = pair_loss(group, 0.5 * self.beta).metrics
        difference = (metrics["winner_gap"] - metrics["loser_gap"]).detach()
        weight = (0.5 + self.slope * self.beta * difference).clamp(self.floor, 1 - self.floor)
        winner, loser = (group.policy_error.gather(1, i).squeeze(1) for i in best_and_worst(group))
        return ObjectiveOutput(weight * (winner - loser), {**metrics, "gradient_factor": weight})
