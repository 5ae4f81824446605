"""DisCO (Li et al., arXiv 2505.12366): good images against the hard ones among the bad, within a trust region."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from diffalign.objectives.base import Charts, GroupErrors, LabelKind, Members, Objective, ObjectiveOutput, all_labels
from diffalign.objectives.dpo import PAIR_CHARTS

if TYPE_CHECKING:
    from torch import Tensor


def discrimination(scores: Tensor, positive: Tensor, tau: float | None) -> Tensor:
    """Return the mean over positives of s - tau log mean over negatives of exp(s' / tau), [B].

    scores [B, K]; positive [B, K], bool. tau None takes the plain mean over the negatives (the paper's DisCO-b), the limit
    of large tau. The result is 0 for a group whose images are all of one kind.
    """
    both = positive.any(dim=1) & (~positive).any(dim=1)
    up, down = positive.to(scores.dtype), (~positive).to(scores.dtype)
    good = (up * scores).sum(1) / up.sum(1).clamp_min(1)
    if tau is None:
        bad = (down * scores).sum(1) / down.sum(1).clamp_min(1)
    else:
        # In a group without negatives nothing is masked: it counts as 0 below, but 0 times infinity would be NaN.
        kept = (scores / tau).masked_fill(positive & both[:, None], -math.inf)
        bad = tau * (kept.logsumexp(dim=1) - down.sum(1).clamp_min(1).log())
    return (good - bad) * both


@dataclass(frozen=True)
class DisCO(Objective):
    """-(mean_+ s - tau log mean_- exp(s / tau)) + trust max(0, D - radius)^2, with s = -beta d.

    The paper states a constrained problem with its penalty, for language models. Our mapping: s is the implicit reward
    (their ratio), D the mean over the group's images of the squared difference between the predictions of policy and
    reference, and the reference the frozen one (theirs is the policy of the last round). Positives have a label of
    `threshold` or more; without a threshold, a label above the group's mean, which is success and failure where labels are 0
    and 1. There are no ties to break: equal images are on one side. A group with one side only gets the trust region's
    gradient alone.

    Unlike a softmax over all images, the denominator holds the negatives alone: positives do not compete. A small tau
    weighs only the negative with the largest s, a large tau weighs all alike. The first part is linear in the positives and
    pushes negatives without bound; the second part bounds it, with a gradient that is 0 inside the radius and grows outside.
    The authors' code has half of that gradient.
    """

    beta: float = field(
        default=20.0, metadata={"gt": 0, "description": "scale of the implicit reward, for mean errors"}
    )
    tau: float | None = field(
        default=1.0,
        metadata={
            "gt": 0,
            "description": "small: only the bad image that the policy likes best counts; null: all alike",
        },
    )
    threshold: float | None = field(
        default=None,
        metadata={"description": "lowest label of a good image; null: good images are above the group's mean"},
    )
    radius: float = field(
        default=0.01,
        metadata={"ge": 0, "description": "mean squared difference to the reference's predictions without a penalty"},
    )
    trust: float = field(
        default=1000.0, metadata={"ge": 0, "description": "weight of the squared excess over the radius"}
    )

    title: ClassVar[str] = "DisCO"
    needs_reference: ClassVar[bool] = True
    needs_gap: ClassVar[bool] = True
    label_kind: ClassVar[LabelKind] = "score"
    members: ClassVar[Members] = "all"
    charts: ClassVar[Charts] = {
        "discrimination": ("Discrimination", "good images against the bad ones, in units of beta d"),
        "winner_gap": PAIR_CHARTS["winner_gap"],
        "loser_gap": PAIR_CHARTS["loser_gap"],
        "outside_trust": ("Outside the trust region", "share of groups"),
    }

    def positives(self, labels: Tensor) -> Tensor:
        """Return which images are good, [B, K] bool, from labels [B, K]."""
        if self.threshold is not None:
            return labels >= self.threshold
        return labels > labels.mean(dim=1, keepdim=True)

    def __call__(self, group: GroupErrors) -> ObjectiveOutput:
        if group.prediction_gap is None:
            raise ValueError("DisCO's trust region needs the prediction gap: prediction_gap is missing")
        labels, d = all_labels(group), group.error_difference
        positive = self.positives(labels)
        gained = discrimination(-self.beta * d, positive, self.tau).masked_fill(labels.isnan().any(dim=1), math.nan)
        gap = group.prediction_gap.mean(dim=1)
        outside = (gap - self.radius).relu()
        up, down = positive.to(d.dtype), (~positive).to(d.dtype)
        metrics = {
            "discrimination": gained,
            "winner_gap": (up * d).sum(1) / up.sum(1).clamp_min(1),
            "loser_gap": (down * d).sum(1) / down.sum(1).clamp_min(1),
            "trust_penalty": self.trust * outside.square(),
            "outside_trust": (outside > 0).to(d.dtype),
            "positives": up.mean(dim=1),
        }
        return ObjectiveOutput(metrics["trust_penalty"] - gained, metrics)
