"""IPO (Azar et al., arXiv 2310.12036): the margin is led to a target instead of being raised without end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from diffalign.objectives.base import GroupErrors, LabelKind, Members, ObjectiveOutput
from diffalign.objectives.dpo import pair_loss

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class IPO:
    """(margin - 1/2)^2 with Diffusion-DPO's margin -beta / 2 (d_w - d_l), of the best and the worst image.

    The paper's equation 17 is (h - 1 / (2 tau))^2 for h, the difference of the log-ratios of two texts. With tau h in the
    place of Diffusion-DPO's margin (our mapping; the paper is about language models) that is 1 / tau^2 times what stands
    here, so beta keeps the meaning, the scale and the published values that it has in `DiffusionDPO`.

    At policy = reference the loss is 1/4 and it pulls twice as hard as Diffusion-DPO: the derivative for the margin is
    -1, there -1/2. It vanishes at the target 1/2 and turns beyond it, so a margin that is small already is not raised
    further however often its pair comes up, which is what the paper proposes against overfitting. It also grows without
    bound where a pair is far on the wrong side, so a few such pairs can dominate a step.
    """

    beta: float = 2000.0

    needs_reference: ClassVar[bool] = True
    needs_gap: ClassVar[bool] = False
    label_kind: ClassVar[LabelKind] = "score"
    members: ClassVar[Members] = "best_worst"

    def __call__(self, group: GroupErrors) -> ObjectiveOutput:
        metrics = dict(pair_loss(group, 0.5 * self.beta).metrics)
        # A sigmoid's gradient factor says nothing here: what is left to learn is the way to the target.
        del metrics["gradient_factor"]
        left: Tensor = 0.5 - metrics["margin"]
        return ObjectiveOutput(left.square(), {**metrics, "to_target": left})
