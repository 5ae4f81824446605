"""Diffusion-DPO under a constraint: the winner's error may not rise above the reference's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffalign.objectives.base import GroupErrors, LabelKind, Members, ObjectiveOutput
from diffalign.objectives.dpo import pair_loss


@dataclass(frozen=True)
class ConstrainedDPO:
    """-log sigmoid(-beta / 2 (d_w - d_l)) + weight beta / 2 max(0, d_w), of the best and the worst image.

    CPO (Xu et al., arXiv 2401.08417, section 3) keeps the policy from leaving what is preferred by a constraint on the
    winner, and relaxes it to a plain likelihood term that always pulls. This form, which is ours, keeps the constraint: an
    exact penalty, 0 as long as the policy fits the winner at least as well as the reference does. DPO-Positive (arXiv
    2402.13228) has the same one-sided term inside the log-sigmoid, where it fades as the margin saturates; outside, it
    does not.

    In units of the margin: a weight above 1 outweighs the pull on the loser wherever both raise the winner's error
    alike. At policy = reference d_w is 0, and loss and gradient are Diffusion-DPO's. The constraint is judged draw by draw of
    noise and time, which is stricter than on their mean. `violated` is the share of groups in which it is broken.
    """

    beta: float = 2000.0
    weight: float = 1.0

    needs_reference: ClassVar[bool] = True
    needs_gap: ClassVar[bool] = False
    label_kind: ClassVar[LabelKind] = "score"
    members: ClassVar[Members] = "best_worst"

    def __call__(self, group: GroupErrors) -> ObjectiveOutput:
        output = pair_loss(group, 0.5 * self.beta)
        rise = output.metrics["winner_gap"].relu()
        loss = output.loss + self.weight * 0.5 * self.beta * rise
        return ObjectiveOutput(loss, {**output.metrics, "violated": (rise > 0).to(loss.dtype)})
