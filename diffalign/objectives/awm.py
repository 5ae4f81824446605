"""AWM (advantage weighted matching): a policy gradient whose likelihood is minus the error of the forward process."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from diffalign.objectives.base import Charts, GroupErrors, LabelKind, Members, Objective, ObjectiveOutput, all_labels
from diffalign.objectives.dpo import MARGIN_CHARTS
from diffalign.objectives.group_metrics import order_metrics

if TYPE_CHECKING:
    from torch import Tensor

Weight = Literal["uniform", "t", "t2", "huber", "generalised_huber"]
HUBER, POWER = 1e-10, 0.25  # the released code's


@dataclass(frozen=True)
class AWM(Objective):
    """-mean over images of min(rho A, clip(rho, 1 - c, 1 + c) A), rho = exp(l - l_old), l = -w(t) e, with two anchors.

    Labels are advantages A, divided by `scale`: `labels.transform: advantage` makes them as the released code does, over the
    deviation of all images, clipped at 5, and the code divides them by 5. The old policy is the reference, at the same noise
    and time. The code's errors are means over the latent, so rho lies within about a thousandth of 1 and the clip seldom acts:
    what limits a step is the anchor. With c = 1, as released, only a ratio above 2 is cut, and only for a good image.

    `weight` is w(t): 1, t or t squared, t from 0 (image) to 1 (noise); or an error that grows more slowly,
    l = -t ((e + 1e-10)^p - 1e-10^p) with p = 1/2 (huber), or four times this with p = 1/4 (generalised_huber).

    At policy = reference the loss is minus the mean advantage, which is 0 for a whole group, and its gradient is not zero.
    Raises ValueError where an image has no label, or where the time or a gap that it needs is missing.
    """

    weight: Weight = field(
        default="uniform", metadata={"description": "of an error in the log-likelihood; t: noise counts more"}
    )
    clip: float = field(
        default=1.0, metadata={"gt": 0, "description": "how far a ratio may lead from 1 before it pulls no further"}
    )
    scale: float = field(default=5.0, metadata={"gt": 0, "description": "what advantages are divided by"})
    anchor: float = field(
        default=0.001,
        metadata={
            "ge": 0,
            "description": "weight of the mean squared difference from the base's prediction; the code has 0.001 for GenEval "
            "and 0.003 elsewhere; 0: none",
        },
    )
    old_gap: float = field(
        default=0.0,
        metadata={"ge": 0, "description": "weight of the mean squared difference from the reference's prediction"},
    )

    title: ClassVar[str] = "AWM; labels are advantages"
    needs_reference: ClassVar[bool] = True
    needs_gap: ClassVar[bool] = True
    label_kind: ClassVar[LabelKind] = "advantage"
    members: ClassVar[Members] = "all"
    charts: ClassVar[Charts] = {
        **MARGIN_CHARTS,
        "margin": ("Margin", "error difference of the worst image less that of the best; above 0 is right"),
        "pull": ("Pull", "mean of A d; falls below 0 as labels are learnt"),
        "ratio_change": ("Change of the ratio", "mean |rho - 1|"),
        "clipped": ("Clipped", "share of images that the clip leaves without a gradient"),
        "anchor_gap": ("Difference from the base", "mean squared, of predictions"),
    }

    @property
    def needs_anchor_gap(self) -> bool:
        return self.anchor > 0

    def weighted(self, error: Tensor, time: Tensor | None) -> Tensor:
        """Return -l, [B, K], of errors [B, K] at times [B]."""
        if self.weight == "uniform":
            return error
        if time is None:
            raise ValueError(f"weight={self.weight} needs the times: time is missing")
        t = time.to(error.dtype)[:, None]
        if self.weight == "t":
            return t * error
        if self.weight == "t2":
            return t * t * error
        power, factor = (0.5, 1.0) if self.weight == "huber" else (POWER, 1 / POWER)
        return factor * t * ((error + HUBER) ** power - HUBER**power)

    def __call__(self, group: GroupErrors) -> ObjectiveOutput:
        labels, d = all_labels(group), group.error_difference
        advantage, old = labels / self.scale, group.policy_error - d
        ratio = (self.weighted(old, group.time) - self.weighted(group.policy_error, group.time)).exp()
        limited = ratio.clamp(1 - self.clip, 1 + self.clip)
        gained = (ratio * advantage).minimum(limited * advantage)
        loss = -gained.mean(1)
        metrics = {
            **order_metrics(group),
            "pull": (advantage * d).mean(1),
            "ratio_change": (ratio - 1).abs().mean(1),
            "clipped": ((limited != ratio) & (limited * advantage < ratio * advantage)).to(d.dtype).mean(1),
        }
        if self.anchor:
            if group.anchor_gap is None:
                raise ValueError("AWM's anchor needs the gap to the base's predictions: anchor_gap is missing")
            metrics["anchor_gap"] = group.anchor_gap.mean(1)
            loss = loss + self.anchor * metrics["anchor_gap"]
        if self.old_gap:
            if group.prediction_gap is None:
                raise ValueError("old_gap needs the gap to the old policy's predictions: prediction_gap is missing")
            loss = loss + self.old_gap * group.prediction_gap.mean(1)
        return ObjectiveOutput(loss, metrics)
