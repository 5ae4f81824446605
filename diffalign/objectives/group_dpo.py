"""Group DPO with advantages: the loss of GDPO-SR, of which DGPO (Luo et al., ICLR 2026) is another form."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from diffalign.objectives.base import (
    Charts,
    GroupErrors,
    LabelKind,
    Members,
    Objective,
    ObjectiveOutput,
    all_labels,
    label_range,
    logsigmoid,
)
from diffalign.objectives.dpo import PAIR_CHARTS
from diffalign.objectives.group_metrics import order_metrics

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class GroupDPO(Objective):
    """-log sigmoid(-omega / 2 sum_i A_i d_i), A_i = (r_i - mean) / (std + eps) within the group.

    One sigmoid for the whole group; the advantages share its pull out. GDPO-SR's released code has the sum over images,
    the deviation with n - 1, eps 1e-8 and omega 5000 for groups of six. Its sum grows with the size of the group, so that
    the sigmoid soon shuts; `reduction: mean` does not depend on the size. DGPO's code has the mean over images without the
    1/2 (its beta is omega / 2), the deviation with n and eps 1e-4, and multiplies beta mean(A e) by the sigmoid taken without
    a gradient: the same gradient.

    Advantages have no scale: a group whose scores differ by 1e-6 counts as much as one that differs by 1. `min_spread`
    (ours) gives such groups none. A number added to every d changes nothing, since the advantages sum to 0, and nothing
    holds the errors down: watch `winner_gap`.

    Two images and omega are Diffusion-DPO with beta = omega (deviation population, eps 0) or omega / sqrt 2 (sample). At
    policy = reference the loss is log 2 and its gradient is not zero. Raises ValueError where an image has no label.
    """

    omega: float = field(
        default=5000.0,
        metadata={
            "gt": 0,
            "description": "strength of the pull to the reference, for mean errors, with the factor 1/2 of Diffusion-DPO",
        },
    )
    reduction: Literal["sum", "mean"] = field(
        default="mean",
        metadata={"description": "of A d over the images; sum: GDPO-SR; mean: does not depend on the group's size"},
    )
    deviation: Literal["sample", "population"] = field(
        default="sample",
        metadata={"description": "divides by n - 1 (sample: GDPO-SR) or n (population: DGPO)"},
    )
    eps: float = field(
        default=1e-8, metadata={"ge": 0, "description": "added to the deviation; GDPO-SR 1e-8, DGPO 1e-4"}
    )
    clip: float | None = field(
        default=5.0, metadata={"gt": 0, "description": "largest advantage, either way; null: none"}
    )
    min_spread: float = field(
        default=0.0,
        metadata={"ge": 0, "description": "groups whose best and worst label differ by less have no advantage"},
    )

    title: ClassVar[str] = "group DPO with advantages"
    needs_reference: ClassVar[bool] = True
    needs_gap: ClassVar[bool] = False
    label_kind: ClassVar[LabelKind] = "score"
    members: ClassVar[Members] = "all"
    charts: ClassVar[Charts] = {
        **PAIR_CHARTS,
        "advantage_sum": ("Sum of |A|", "over a group; 0 where all labels are equal"),
        "advantage_ends": ("Share of the ends", "of |A|, on the best and the worst image"),
    }

    def advantages(self, labels: Tensor) -> Tensor:
        """Return A [B, K] from labels [B, K]."""
        from diffalign.objectives.advantages import standardised

        found = standardised(labels, sample_std=self.deviation == "sample", epsilon=self.eps)
        high, low = label_range(labels)
        found = found.masked_fill((high - low < self.min_spread)[:, None], 0.0)
        return found if self.clip is None else found.clamp(-self.clip, self.clip)

    def __call__(self, group: GroupErrors) -> ObjectiveOutput:
        labels = all_labels(group)
        advantage = self.advantages(labels).masked_fill(~labels.isfinite(), float("nan"))
        pulls = advantage * group.error_difference
        x = -0.5 * self.omega * (pulls.sum(1) if self.reduction == "sum" else pulls.mean(1))
        size = advantage.abs()
        ends = size.gather(1, labels.argmax(1, keepdim=True)) + size.gather(1, labels.argmin(1, keepdim=True))
        metrics = {
            **order_metrics(group),
            "margin": x,
            "gradient_factor": (-x).sigmoid(),
            "advantage_sum": size.sum(1),
            "advantage_ends": ends.squeeze(1) / size.sum(1).clamp_min(1e-12),
        }
        return ObjectiveOutput(-logsigmoid(x), metrics)
