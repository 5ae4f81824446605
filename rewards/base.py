"""The seam that every reward stands behind."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

Metadata = dict[str, Any]


class Reward(ABC):
    """Scores images against their prompts. Higher is better; NaN where an image cannot be scored.

    columns: what `measure` returns, the score first. range: the score's bounds. licence, weights: of what it runs on.
    requires: what must be installed besides diffalign. version: changes whenever scores may.
    reasons: after a call, why image i was not scored ("" where it was).
    """

    name: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]
    range: ClassVar[tuple[float, float]]
    licence: ClassVar[str]
    weights: ClassVar[str]
    requires: ClassVar[tuple[str, ...]] = ()
    differentiable: ClassVar[bool] = False
    version: ClassVar[str] = "1"

    reasons: list[str]

    def score(self, images: list[Image.Image], prompts: list[str], metadata: list[Metadata] | None = None) -> Tensor:
        """The first column of `measure`: float32 [B]."""
        return self.measure(images, prompts, metadata)[self.columns[0]]

    @abstractmethod
    def measure(
        self, images: list[Image.Image], prompts: list[str], metadata: list[Metadata] | None = None
    ) -> dict[str, Tensor]:
        """Every column, each float32 [B]."""


def by_column(columns: tuple[str, ...], rows: list[tuple[float, ...]]) -> dict[str, Tensor]:
    """Rows of values as one float32 tensor a column."""
    return {name: torch.tensor([row[i] for row in rows], dtype=torch.float32) for i, name in enumerate(columns)}
