"""The seam that every reward stands behind."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from diffalign.errors import DiffalignError

Metadata = dict[str, Any]
Prepared = Image.Image | Tensor
"""What `prepare` makes of an image: the image itself, or the tensor that a network takes."""


class Reward(ABC):
    """Scores images against their prompts. Higher is better; NaN where an image cannot be scored.

    columns: what `measure` returns, the score first; NAME@LEVEL is a bin of a distribution, which no summary shows.
    range: the score's bounds. usual: where most pictures lie, if the bounds do not say. licence, weights: of what it runs on.
    requires: what must be installed besides diffalign. version: changes whenever scores may. source: paper or code that
    defines it. size: what the weights take. reads: what a score depends on besides the image.
    preprocessing: how pixels become the model's input. reasons: after a call, why image i was not scored ("" where it was).

    Building a reward loads nothing: weights come with the first image, or with `identity`, which names them.
    """

    name: ClassVar[str]
    columns: tuple[str, ...]
    range: ClassVar[tuple[float, float]]
    usual: ClassVar[str] = ""
    licence: ClassVar[str]
    weights: ClassVar[str]
    requires: ClassVar[tuple[str, ...]] = ()
    differentiable: ClassVar[bool] = False
    version: ClassVar[str] = "1"
    source: ClassVar[str] = ""
    size: ClassVar[str] = "none"
    reads: ClassVar[tuple[str, ...]] = ("prompt",)

    preprocessing: str = "RGB"
    reasons: list[str]

    def score(self, images: list[Image.Image], prompts: list[str], metadata: list[Metadata] | None = None) -> Tensor:
        """The first column of `measure`: float32 [B]."""
        return self.measure(images, prompts, metadata)[self.columns[0]]

    @abstractmethod
    def measure(
        self, images: list[Image.Image], prompts: list[str], metadata: list[Metadata] | None = None
    ) -> dict[str, Tensor]:
        """Every column, each float32 [B]."""

    def prepare(self, image: Image.Image) -> Prepared:
        """The part of the preprocessing that needs no model, so that it can run in the threads that decode."""
        return image

    def measure_prepared(
        self, items: Sequence[Any], prompts: list[str], metadata: list[Metadata] | None = None
    ) -> dict[str, Tensor]:
        """`measure` of what `prepare` returned."""
        return self.measure(list(items), prompts, metadata)

    def score_tensors(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        """The score of float pixels [B, 3, H, W] in [0, 1], float32 [B], with its gradient to the pixels."""
        raise DiffalignError(f"reward {self.name} is not differentiable; `diffalign rewards` lists those that are")

    def reason_not_scorable(self, prompt: str | None, metadata: Metadata) -> str:
        """Why an image with this prompt cannot be scored, "" if it can: known before anything is decoded."""
        return "no prompt" if "prompt" in self.reads and not (prompt or "").strip() else ""

    def options(self) -> dict[str, Any]:
        """The options that change a score."""
        return {}

    def weights_id(self) -> str:
        """Which weights these are, revision or fingerprint included."""
        return self.weights

    def identity(self) -> dict[str, Any]:
        """What a score depends on besides image, prompt and metadata: two equal identities give equal scores."""
        return {
            "reward": self.name,
            "version": self.version,
            "weights": self.weights_id(),
            "preprocessing": self.preprocessing,
            "reads": ["image", *self.reads],
            **({"options": self.options()} if self.options() else {}),
        }

    def free(self) -> None:
        """Let go of weights; the next call loads them again."""
        return


def by_column(columns: tuple[str, ...], rows: list[tuple[float, ...]]) -> dict[str, Tensor]:
    """Rows of values as one float32 tensor a column."""
    return {name: torch.tensor([row[i] for row in rows], dtype=torch.float32) for i, name in enumerate(columns)}
