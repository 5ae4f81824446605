"""SimPO (Meng et al., arXiv 2405.14734): no reference, and a margin by which the winner must lead."""

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
    logsigmoid,
)
from diffalign.objectives.dpo import PAIR_CHARTS


@dataclass(frozen=True)
class SimPO(Objective):
    """-log sigmoid(-beta / 2 (e_w - e_l) - gamma), e the policy's own errors of the best and the worst image.

    The paper's equation 6, with the mean squared error in the place of the mean negative log-likelihood of a token (our
    mapping): a mean over elements is what a length-normalised likelihood is to texts. The 1/2 is Diffusion-DPO's, so that
    beta means the same there and here. `anchor` is the weight of the winner's error in the loss. gamma = 0 with an anchor is
    the form of *contrastive* preference
    optimisation (CPO, arXiv 2401.08417).

    Half the forward passes and no second model. But the errors of two images differ before anything is learnt, by what
    the images show: a busy picture is harder than a plain one under every model. A reference would cancel this; here
    it stays in the margin, so beta must be small enough for it not to saturate the sigmoid, and nothing ties the policy
    to its start. `error_order` is the share of groups whose winner has the lower error: it is no accuracy, and
    need not start at a half.
    """

    beta: float = field(
        default=20.0,
        metadata={
            "gt": 0,
            "description": "scale of the difference of the two errors, mean errors, with the factor 1/2; without a "
            "reference the images' own difference stays in it, so it must be far smaller than Diffusion-DPO's",
        },
    )
    gamma: float = field(default=0.5, metadata={"ge": 0, "description": "margin by which the winner must lead"})
    anchor: float = field(
        default=0.0, metadata={"ge": 0, "description": "weight of the policy's error on the winner; 0: none"}
    )

    title: ClassVar[str] = "SimPO, reference-free"
    needs_reference: ClassVar[bool] = False
    needs_gap: ClassVar[bool] = False
    label_kind: ClassVar[LabelKind] = "score"
    members: ClassVar[Members] = "best_worst"
    charts: ClassVar[Charts] = {
        "margin": PAIR_CHARTS["margin"],
        "gradient_factor": PAIR_CHARTS["gradient_factor"],
        "error_order": ("Winner's error is the lower", "share of groups; it need not start at a half"),
        "winner_error": ("Winner's error", "mean squared"),
        "loser_error": ("Loser's error", "mean squared; without a reference nothing else holds it"),
    }

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
