"""Diffusion-DPO under a constraint: the winner's error may not rise above the reference's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from diffalign.objectives.base import BETA, Charts, GroupErrors, LabelKind, Members, Objective, ObjectiveOutput
from diffalign.objectives.dpo import PAIR_CHARTS, pair_loss


@dataclass(frozen=True)
class ConstrainedDPO(Objective):
    """-log sigmoid(-beta / 2 (d_w - d_l)) + weight beta / 2 max(0, d_w), of the best and the worst image.

    A method of ours. Contrastive preference optimisation (Xu et al., arXiv 2401.08417, section 3) keeps the policy from
    leaving what is preferred by a constraint on the winner, and relaxes it to a plain likelihood term that always pulls. This
    form keeps the constraint: an exact penalty, 0 as long as the policy fits the winner at least as well as the reference
    does. DPO-Positive (arXiv 2402.13228) has the same one-sided term inside the log-sigmoid, where it fades as the margin
    saturates; outside, it does not. *Constrained* preference optimisation (arXiv 2605.20834) is another method: `dpo` with
    an `offset`.

    In units of the margin: a weight above 1 outweighs the pull on the loser wherever both raise the winner's error
    alike. At policy = reference d_w is 0, and loss and gradient are Diffusion-DPO's. The constraint is checked on each draw
    of noise and time, which is stricter than on their mean. `violated` is the share of groups in which it is broken.
    """

    beta: float = field(default=2000.0, metadata={"gt": 0, "description": BETA})
    weight: float = field(
        default=1.0,
        metadata={
            "gt": 0,
            "description": "weight of the rise of the winner's error, in the margin's unit; above 1 it outweighs the pull",
        },
    )

    title: ClassVar[str] = "Diffusion-DPO under a constraint on the winner"
    needs_reference: ClassVar[bool] = True
    needs_gap: ClassVar[bool] = False
    label_kind: ClassVar[LabelKind] = "score"
    members: ClassVar[Members] = "best_worst"
    charts: ClassVar[Charts] = {
        **PAIR_CHARTS,
        "violated": ("Constraint violated", "share of groups whose winner's error is above the reference's"),
    }

    def __call__(self, group: GroupErrors) -> ObjectiveOutput:
        output = pair_loss(group, 0.5 * self.beta)
        rise = output.metrics["winner_gap"].relu()
        loss = output.loss + self.weight * 0.5 * self.beta * rise
        return ObjectiveOutput(loss, {**output.metrics, "violated": (rise > 0).to(loss.dtype)})
