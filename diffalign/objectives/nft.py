"""DiffusionNFT (negative-aware fine-tuning): good images pull the policy, bad ones push it, at the forward process."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from diffalign.objectives.base import Charts, GroupErrors, LabelKind, Members, Objective, ObjectiveOutput, all_labels
from diffalign.objectives.dpo import MARGIN_CHARTS
from diffalign.objectives.group_metrics import order_metrics

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST_ERROR = 1e-10  # of a squared error that is divided by; the identities below cancel in float32
SMALLEST_L1 = 1e-5  # the released code's


@dataclass(frozen=True)
class NFT(Objective):
    """scale [mean over images of (r e+ + (1 - r) e-) / beta] + anchor (difference from the base's prediction).

    r in [0, 1] is how good an image is. e+ and e- are the errors of two implicit policies at the same noisy latent,
    v+ = beta v + (1 - beta) v_old and v- = (1 + beta) v_old - beta v, which follow from the errors e and e_old and from the
    gap g, the mean squared difference of the two predictions:

        e+ = beta e + (1 - beta) e_old - beta (1 - beta) g,    e- = -beta e + (1 + beta) e_old + beta (1 + beta) g.

    So one image's term is A' d + (beta - A') g plus a constant, with A' = 2 r - 1: errors go down or up by A', and every image
    pulls the policy to the old one. It is never unbounded below. Its minimum is at v_old + (A' / beta) (target - v_old): with
    beta 1 a good image is fitted at most, with beta 0.1 the policy goes ten times as far.

    The old policy is the reference. The released code divides each squared error by its mean absolute residual, taken without a
    gradient: `normalise: l1`; `rms` is the same with the root of the mean square, and needs no more than the errors. The code's
    errors are those of x0: `error_space: x0`. Its labels are clip(A / 10 + 1/2, 0, 1): `labels.transform: optimality`. The code
    multiplies the loss by its clipping bound, 5, which is `scale`.

    Raises ValueError where an image has no label, or where a gap that it needs is missing.
    """

    beta: float = field(
        default=1.0,
        metadata={
            "gt": 0,
            "description": "how near the policy stays: the optimum is 1 / beta of the way to the target; the code has 1, and "
            "0.1 for OCR and several rewards",
        },
    )
    normalise: Literal["none", "rms", "l1"] = field(
        default="rms",
        metadata={
            "description": "what a squared error is divided by, without gradient; l1: mean absolute residual, as the code; "
            "rms: root of the error; none: 1"
        },
    )
    scale: float = field(default=5.0, metadata={"gt": 0, "description": "factor of the loss without the anchor"})
    anchor: float = field(
        default=1e-4,
        metadata={"ge": 0, "description": "weight of the mean squared difference from the base's prediction; 0: none"},
    )

    title: ClassVar[str] = "DiffusionNFT; labels in [0, 1]"
    needs_reference: ClassVar[bool] = True
    needs_gap: ClassVar[bool] = True
    label_kind: ClassVar[LabelKind] = "optimality"
    members: ClassVar[Members] = "all"
    charts: ClassVar[Charts] = {
        **MARGIN_CHARTS,
        "margin": ("Margin", "error difference of the worst image less that of the best; above 0 is right"),
        "pull": ("Pull", "mean of (2 r - 1) d; falls below 0 as labels are learnt"),
        "anchor_gap": ("Difference from the base", "mean squared, of predictions"),
    }

    @property
    def needs_anchor_gap(self) -> bool:
        return self.anchor > 0

    @property
    def mixed_residuals(self) -> tuple[float, ...]:
        return (self.beta, -self.beta) if self.normalise == "l1" else ()

    def _normaliser(self, group: GroupErrors, error: Tensor, place: int) -> Tensor | float:
        """Return what e+ (place 0) or e- (place 1) is divided by, [B, K], without a gradient."""
        if self.normalise == "none":
            return 1.0
        if self.normalise == "rms":
            return error.detach().clamp_min(SMALLEST_ERROR).sqrt()
        if group.policy_l1 is None:
            raise ValueError("normalise=l1 needs the mean absolute residuals: policy_l1 is missing")
        return group.policy_l1[:, :, place].detach().clamp_min(SMALLEST_L1)

    def __call__(self, group: GroupErrors) -> ObjectiveOutput:
        if group.prediction_gap is None:
            raise ValueError("NFT needs the gap to the old policy's predictions: prediction_gap is missing")
        r, d, gap, beta = all_labels(group), group.error_difference, group.prediction_gap, self.beta
        e, old = group.policy_error, group.policy_error - d
        better = beta * e + (1 - beta) * old - beta * (1 - beta) * gap
        worse = -beta * e + (1 + beta) * old + beta * (1 + beta) * gap
        terms = r * better / self._normaliser(group, better, 0) + (1 - r) * worse / self._normaliser(group, worse, 1)
        loss = self.scale * terms.mean(1) / beta
        metrics = {**order_metrics(group), "pull": ((2 * r - 1) * d).mean(1)}
        if self.anchor:
            if group.anchor_gap is None:
                raise ValueError("NFT's anchor needs the gap to the base's predictions: anchor_gap is missing")
            metrics["anchor_gap"] = group.anchor_gap.mean(1)
            loss = loss + self.anchor * metrics["anchor_gap"]
        return ObjectiveOutput(loss, metrics)
