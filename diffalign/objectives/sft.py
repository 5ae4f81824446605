"""Supervised fine-tuning on the best image of each group: the baseline that every preference method must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffalign.objectives.base import (
    Charts,
    GroupErrors,
    LabelKind,
    Members,
    Objective,
    ObjectiveOutput,
    best_and_worst,
)


@dataclass(frozen=True)
class SFT(Objective):
    """The policy's denoising error on the best image."""

    title: ClassVar[str] = "fine-tuning on the best image of each group"
    needs_reference: ClassVar[bool] = False
    needs_gap: ClassVar[bool] = False
    label_kind: ClassVar[LabelKind] = "score"
    members: ClassVar[Members] = "best"
    charts: ClassVar[Charts] = {"winner_error": ("Winner's error", "mean squared")}

    def __call__(self, group: GroupErrors) -> ObjectiveOutput:
        best, _ = best_and_worst(group)
        error = group.policy_error.gather(1, best).squeeze(1)
        return ObjectiveOutput(error, {"winner_error": error})
