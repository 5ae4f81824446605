"""Diffusion-DPO (Wallace et al., arXiv 2311.12908), in the convention of the authors' code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from diffalign.objectives.base import GroupErrors, LabelKind, Members, ObjectiveOutput, best_and_worst, logsigmoid

if TYPE_CHECKING:
    from torch import Tensor


def pair_loss(
    group: GroupErrors,
    strength: float | Tensor,
    loser_weight: float = 1.0,
    margin_clamp: float | None = None,
    anchor: float = 0.0,
) -> ObjectiveOutput:
    """-log sigmoid(-strength (d_w - d_l)) of the best and the worst image; `strength` is a number or [B].

    The other three are those of `DiffusionDPO`.
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
        "gradient_factor": (-margin).sigmoid(),
    }
    anchored = anchor * group.policy_error.gather(1, best).squeeze(1) if anchor else 0.0
    return ObjectiveOutput(-logsigmoid(pulled) + anchored, metrics)


@dataclass(frozen=True)
class DiffusionDPO:
    """-log sigmoid(-beta / 2 (d_w - d_l)), with d = policy error - reference error.

    w and l are the best and the worst image of the group. The paper's equation 14 has beta T omega in front and sums the
    squared error; the authors' code has beta / 2 and the mean over the latent's elements, which is what is meant here
    and what the published betas (2000 for SD1.5, 5000 for SDXL) belong to. With the mean, a fixed beta means a weaker
    tie to the reference per latent element at a higher resolution. For flow models errors are those of the velocity
    with a constant beta, as Flow-DPO (arXiv 2501.13918) recommends over beta (1 - t)^2.

    At policy = reference the loss is log 2 and its gradient is not zero.

    Three remedies for runs that unlearn both images, none of them in the paper and off by default: `loser_weight` < 1
    multiplies d_l, so that the loser cannot carry the margin alone; `margin_clamp` ends the pull where a margin has
    reached it; `anchor` adds that many times the policy's error on the winner (as GDRO's stabiliser does).
    """

    beta: float = 2000.0
    loser_weight: float = 1.0
    margin_clamp: float | None = None
    anchor: float = 0.0

    needs_reference: ClassVar[bool] = True
    needs_gap: ClassVar[bool] = False
    label_kind: ClassVar[LabelKind] = "score"
    members: ClassVar[Members] = "best_worst"

    def __call__(self, group: GroupErrors) -> ObjectiveOutput:
        return pair_loss(group, 0.5 * self.beta, self.loser_weight, self.margin_clamp, self.anchor)
