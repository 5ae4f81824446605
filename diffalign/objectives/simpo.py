"""SimPO (Meng et al., arXiv 2405.14734): no reference, and a margin that the winner must be ahead by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffalign.objectives.base import GroupErrors, LabelKind, Members, ObjectiveOutput, best_and_worst, logsigmoid


@dataclass(frozen=True)
class SimPO:
    """-log sigmoid(-beta / 2 (e_w - e_l) - gamma), e the policy's own errors of the best and the worst image.

    The paper's equation 6, with the mean squared error in the place of the mean negative log-likelihood of a token (our
    mapping): a mean over elements is what a length-normalised likelihood is to texts. The 1/2 is Diffusion-DPO's, so that
    beta means the same there and here. `anchor` adds that many times the winner's error. gamma = 0 with an anchor is the
    form of CPO (arXiv 2401.08417).

    Half the forward passes and no second model. But the errors of two images differ before anything is learnt, by what
    the images show: a busy picture is harder than a plain one under every model. The reference would take this off; here
    it stays in the margin, so beta must be small enough for it not to saturate the sigmoid, and nothing ties the policy
    to where it started. `error_order` is the share of groups whose winner has the lower error: it is no accuracy, and
    need not start at a half.
    """

    beta: float = 20.0
    gamma: float = 0.5
    anchor: float = 0.0

    needs_reference: ClassVar[bool] = False
    needs_gap: ClassVar[bool] = False
    label_kind: ClassVar[LabelKind] = "score"
    members: ClassVar[Members] = "best_worst"

    def __call__(self, group: GroupErrors) -> ObjectiveOutput:
        best, worst = best_and_worst(group)
        winner, loser = (group.policy_error.gather(1, i).squeeze(1) for i in (best, worst))
        margin = -0.5 * self.beta * (winner - loser)
        loss = -logsigmoid(margin - self.gamma)
        metrics = {
            "margin": margin,
            "error_order": 0.5 * (margin.sign() + 1),
            "winner_error": winner,
            "loser_error": loser,
            "gradient_factor": (self.gamma - margin).sigmoid(),
        }
        return ObjectiveOutput(loss + self.anchor * winner if self.anchor else loss, metrics)
