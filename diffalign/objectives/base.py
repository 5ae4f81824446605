"""The seam between papers and the training loop: what an objective takes, returns and states about itself.

A group is K images of one prompt. Errors are mean squared errors of a prediction over the latent's elements, so every
beta in this package belongs to the *mean* reduction.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from torch import Tensor


LabelKind = Literal["vote_share", "score", "role", "advantage", "optimality", "none"]
Members = Literal["all", "best_worst", "best"]
Charts = Mapping[str, tuple[str, str]]
"""Metric -> the title of its chart and the note below it."""

BETA = "strength of the pull to the reference, as in Diffusion-DPO: for mean errors, with the factor 1/2"
"""The meaning of a beta that several objectives share."""
BETA_END = "beta falls along a cosine to this share of itself in the last step, as 0.5 (PNAPO); null: it stays"
"""Read by the trainer, since an objective does not know the step."""


@dataclass(frozen=True)
class GroupErrors:
    """A batch of B groups of K images; all fields are [B, K] unless stated otherwise.

    policy_error: squared error of the policy's prediction, mean over the latent's elements.
    reference_error: the same for the reference; None where the objective has `needs_reference = False`.
    rewards: labels, higher is better.
    mask: [B], False where a group has fewer than two images.
    order: a seeded random permutation of 0..K-1 in each group, used only to break ties.
    prediction_gap: mean squared difference of policy and reference predictions, where `needs_gap`.
    role: 1 for a real image, 0 for a generated one, where `label_kind` is "role".
    time: [B], the noise level shared by the group, in [0, 1]: t of a flow, timestep / T of a diffusion model.
    anchor_gap: mean squared difference of the policy's prediction from the untrained base's, where `needs_anchor_gap`. It is
    one of native predictions, whatever space the errors are in.
    policy_l1: [B, K, n], mean absolute residual of w policy + (1 - w) reference for each weight w in `mixed_residuals`.
    """

    policy_error: Tensor
    reference_error: Tensor | None = None
    rewards: Tensor | None = None
    mask: Tensor | None = None
    order: Tensor | None = None
    prediction_gap: Tensor | None = None
    role: Tensor | None = None
    time: Tensor | None = None
    anchor_gap: Tensor | None = None
    policy_l1: Tensor | None = None

    @property
    def error_difference(self) -> Tensor:
        """d = policy_error - reference_error, [B, K]; lower means that the policy favours the image.

        Raises ValueError without a reference error.
        """
        if self.reference_error is None:
            raise ValueError("this objective compares with a reference: reference_error is missing")
        return self.policy_error - self.reference_error

    @property
    def labels(self) -> Tensor:
        """The rewards, [B, K]. Raises ValueError without them."""
        if self.rewards is None:
            raise ValueError("this objective ranks the images of a group: rewards are missing")
        return self.rewards


@dataclass(frozen=True)
class ObjectiveOutput:
    """The result of an objective. loss: [B]; metrics: values of shape [B] that the trainer averages and logs."""

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Objective(ABC):
    """Base of all objectives. A subclass is a frozen dataclass of hyperparameters with one call.

    The config's section is built from the fields: their types, defaults and metadata, as in
    `field(default=2000.0, metadata={"gt": 0, "description": "..."})`. Metadata may hold `description`, the bounds `gt`, `ge`,
    `lt`, `le`, and `formerly`: the value of runs from before there was the field, if not the default. A check of several
    fields stands in `__post_init__` and raises ValueError.

    title: how people call the method.
    needs_reference: the loss takes `reference_error`, so the trainer runs the reference.
    needs_gap: the loss takes `prediction_gap`, which needs the reference's predictions and not only its errors.
    label_kind: what labels must be: "vote_share" and "optimality" lie in [0, 1], "advantage" has a mean of about 0 in each
    group, "role" is 1 or 0, "score" is any number, "none" is not read.
    members: which images of a group the loss depends on; the trainer skips the forward passes of the others.
    single_margin: the loss depends on one metric `margin` per group that is proportional to `beta`, so `train.auto_beta` can
    set beta.
    charts: titles of the metrics for the report.
    """

    title: ClassVar[str] = ""
    needs_reference: ClassVar[bool] = True
    needs_gap: ClassVar[bool] = False
    label_kind: ClassVar[LabelKind] = "score"
    members: ClassVar[Members] = "all"
    single_margin: ClassVar[bool] = False
    charts: ClassVar[Charts] = {}

    @property
    def unit_labels(self) -> bool:
        """Whether the loss takes labels as values between 0 and 1; raw scores are then refused."""
        return False

    @property
    def needs_anchor_gap(self) -> bool:
        """Whether the loss takes `anchor_gap`: one more forward pass, of the base, where that is not the reference."""
        return False

    @property
    def mixed_residuals(self) -> tuple[float, ...]:
        """The weights w of the policy in the mixed predictions whose residuals `policy_l1` holds; none: no `policy_l1`."""
        return ()

    @abstractmethod
    def __call__(self, group: GroupErrors) -> ObjectiveOutput:
        """Return the loss and the metrics of B groups, in the dtype of the errors."""


def logsigmoid(x: Tensor) -> Tensor:
    """Return log sigmoid(x), elementwise, without overflow."""
    from torch.nn import functional

    return functional.logsigmoid(x)


def ranking(group: GroupErrors) -> Tensor:
    """Return the indices of the images from best to worst, [B, K]; equal rewards follow `order`, else their position.

    Images without a label (NaN) come last.
    """
    import torch

    rewards = group.labels.masked_fill(~group.labels.isfinite(), -math.inf)
    order = group.order if group.order is not None else torch.arange(rewards.shape[1]).expand_as(rewards)
    by_order = order.to(rewards.device).argsort(dim=1)
    ranked = rewards.gather(1, by_order).argsort(dim=1, descending=True, stable=True)
    return by_order.gather(1, ranked)


def best_and_worst(group: GroupErrors) -> tuple[Tensor, Tensor]:
    """Return the indices [B, 1] of the best and of the worst image of each group; ties by `order`.

    An image without a label is neither, unless the whole group has none.
    """
    ranked = ranking(group)
    last = (labelled_count(group.labels) - 1).clamp_min(0)
    return ranked[:, :1], ranked.gather(1, last[:, None])


def labelled_count(rewards: Tensor) -> Tensor:
    """Return how many images of each group have a label, [B]."""
    return rewards.isfinite().sum(dim=1)


def label_range(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Return the highest and the lowest label of each group, [B] each; -inf and inf for a group without labels."""
    unknown = ~rewards.isfinite()
    return rewards.masked_fill(unknown, -math.inf).amax(dim=1), rewards.masked_fill(unknown, math.inf).amin(dim=1)


def all_labels(group: GroupErrors) -> Tensor:
    """Return the labels, [B, K], for a loss that needs one of every image.

    Raises ValueError where one is missing. On a GPU, where looking would wait for the device, the loss becomes NaN.
    """
    labels = group.labels
    if labels.device.type == "cpu" and not labels.isfinite().all():
        raise ValueError("an image has no label: give this objective the labelled images of a group alone")
    return labels


def has_preference(rewards: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return which groups state a strict preference, [B]: two of their labels differ, and they are not masked out.

    Images without a label (NaN) are no members of their group.
    """
    high, low = label_range(rewards)
    return high > low if mask is None else (high > low) & mask


def check_labels(rewards: Tensor, kind: LabelKind) -> str | None:
    """Return what is wrong with labels [B, K] for an objective of this kind, with the remedy; None if they fit."""
    known = rewards[rewards.isfinite()]
    if kind == "vote_share" and known.numel() and (known.min() < 0 or known.max() > 1):
        return (
            f"vote shares lie in [0, 1], but labels reach from {known.min():.4g} to {known.max():.4g}; set "
            "labels.transform=votes"
        )
    if kind == "optimality" and known.numel() and (known.min() < 0 or known.max() > 1):
        return (
            f"this objective takes labels in [0, 1], but they reach from {known.min():.4g} to {known.max():.4g}; set "
            "labels.transform=optimality, which makes them of scores"
        )
    if kind == "advantage" and not _centred(rewards).all():
        return (
            f"advantages are above 0 for some images of a group and below 0 for others, but labels reach from "
            f"{known.min():.4g} to {known.max():.4g} with a group on one side; set labels.transform=advantage, which makes "
            "them of scores"
        )
    if kind == "role" and not ((known == 0) | (known == 1)).all():
        return (
            f"labels must be 1 for real images and 0 for generated ones, but reach from {known.min():.4g} to "
            f"{known.max():.4g}; `diffalign pairs REAL GENERATED` makes such a dataset"
        )
    return None


def _centred(rewards: Tensor) -> Tensor:
    """Return which groups have labels on both sides of 0, or none but 0, [B]; groups without two labels count as such."""
    high, low = label_range(rewards)
    return ((high > 0) & (low < 0)) | ((high == 0) & (low == 0)) | (labelled_count(rewards) < 2)
