"""IPO (Azar et al., arXiv 2310.12036): the margin has a target instead of rising without bound."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from diffalign.objectives.base import BETA, Charts, GroupErrors, LabelKind, Members, Objective, ObjectiveOutput
from diffalign.objectives.dpo import MARGIN_CHARTS, pair_loss

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class IPO(Objective):
    """(margin - 1/2)^2 with Diffusion-DPO's margin -beta / 2 (d_w - d_l), of the best and the worst image.

    The paper's equation 17 is (h - 1 / (2 tau))^2 for h, the difference of the log-ratios of two texts. With tau h in the
    place of Diffusion-DPO's margin (our mapping; the paper is about language models) that is 1 / tau^2 times the loss
    here, so beta keeps the meaning, the scale and the published values that it has in `DiffusionDPO`.

    At policy = reference the loss is 1/4 and it pulls twice as hard as Diffusion-DPO: the derivative for the margin is
    -1, there -1/2. It vanishes at the target 1/2 and changes sign beyond it, so no margin is raised above the target however
    often its pair comes up: the paper's remedy against overfitting. The loss also grows without bound where a pair is far on
    the wrong side, so a few such pairs can dominate a step.
    """

    beta: float = field(default=2000.0, metadata={"gt": 0, "description": BETA})

    title: ClassVar[str] = "IPO"
    needs_reference: ClassVar[bool] = True
    needs_gap: ClassVar[bool] = False
    label_kind: ClassVar[LabelKind] = "score"
    members: ClassVar[Members] = "best_worst"
    charts: ClassVar[Charts] = {
        **MARGIN_CHARTS,
        "to_target": ("Distance to the target", "1/2 minus the margin: IPO ends at 0"),
    }

    def __call__(self, group: GroupErrors) -> ObjectiveOutput:
        metrics = dict(pair_loss(group, 0.5 * self.beta).metrics)
        # A sigmoid's gradient factor says nothing here: what is left to learn is the distance to the target.
        del metrics["gradient_factor"]
        left: Tensor = 0.5 - metrics["margin"]
        return ObjectiveOutput(left.square(), {**metrics, "to_target": left})
