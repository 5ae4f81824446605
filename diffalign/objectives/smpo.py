"""SmPO-Diffusion (Lu et al., arXiv 2506.02698): Diffusion-DPO whose strength follows how sure the preference is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from diffalign.objectives.base import (
    BETA,
    BETA_END,
    Charts,
    GroupErrors,
    LabelKind,
    Members,
    Objective,
    ObjectiveOutput,
    best_and_worst,
)
from diffalign.objectives.dpo import PAIR_CHARTS, pair_loss

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SmPO(Objective):
    """-log sigmoid(-beta / 2 gamma (2p - 1) (d_w - d_l)) of the best and the worst image of the group.

    p = sigmoid(r_w - r_l) with r = (score - reward_min) / (reward_max - reward_min), the whole dataset's bounds. It is
    the paper's alpha / gamma (equation 9 has 2 alpha - gamma in front), the 1/2 and the mean over elements are those of
    the authors' code, and the published betas (2000 for SD1.5, 5000 for SDXL) belong to both.

    The factor stands inside the log-sigmoid: it is no label smoothing and no weight. Between equal scores it is 0, the
    loss log 2 and its gradient 0. It lies in [0, gamma tanh(1/2)], 4.62 for gamma = 10, and pairs whose scores differ
    by little get far less than Diffusion-DPO's strength. The score alone decides the winner, as in the authors' code.

    PNAPO (arXiv 2605.09433), the successor for flows, has beta (2p - 1) (d_w - d_l), without gamma and 1/2: gamma = 2 here. Its
    beta falls to half along a cosine (`beta_end`), and its noise is what made each image (`noise: tracked`).

    Bounds of 0 and 1 leave labels as they are; use them where `labels.transform: minmax` has scaled the labels.
    Raises ValueError unless reward_max is above reward_min.
    """

    beta: float = field(default=2000.0, metadata={"gt": 0, "description": BETA})
    gamma: float = field(
        default=10.0, metadata={"gt": 0, "description": "how much the difference of the scores matters"}
    )
    reward_min: float = field(
        default=0.0,
        metadata={
            "description": "score that counts as 0; leave 0 and 1 where labels.transform=minmax has scaled the labels"
        },
    )
    reward_max: float = field(default=1.0, metadata={"description": "score that counts as 1"})
    beta_end: float | None = field(default=None, metadata={"gt": 0, "description": BETA_END})

    title: ClassVar[str] = "SmPO-Diffusion"
    needs_reference: ClassVar[bool] = True
    needs_gap: ClassVar[bool] = False
    label_kind: ClassVar[LabelKind] = "score"
    members: ClassVar[Members] = "best_worst"
    single_margin: ClassVar[bool] = True
    charts: ClassVar[Charts] = {**PAIR_CHARTS, "smoothing": ("Smoothing", "gamma (2p - 1): 1 is Diffusion-DPO")}

    def __post_init__(self) -> None:
        if self.reward_max <= self.reward_min:
            raise ValueError(f"reward_max should be above reward_min={self.reward_min:g}, not {self.reward_max:g}")

    @property
    def unit_labels(self) -> bool:
        return (self.reward_min, self.reward_max) == (0.0, 1.0)

    def smoothing(self, group: GroupErrors) -> Tensor:
        """Return gamma (2p - 1), [B]."""
        best, worst = best_and_worst(group)
        scaled = (group.labels - self.reward_min) / (self.reward_max - self.reward_min)
        p = (scaled.gather(1, best) - scaled.gather(1, worst)).squeeze(1).sigmoid()
        return self.gamma * (2 * p - 1)

    def __call__(self, group: GroupErrors) -> ObjectiveOutput:
        smoothing = self.smoothing(group)
        output = pair_loss(group, 0.5 * self.beta * smoothing)
        # A group's gradient is proportional to its smoothing: over a batch, the margin that counts is the ratio of the two.
        weighted = {"smoothing": smoothing, "smoothed_margin": smoothing * output.metrics["margin"]}
        return ObjectiveOutput(output.loss, {**output.metrics, **weighted})
