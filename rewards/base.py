"""Define the interface of every reward."""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.redaction import redacted

LABEL = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""The form of a reward's name: columns and files are called by it."""
TAKEN_COLUMNS = ("group_id", "index", "reason", "identity")
TAKEN_NAMES = (*TAKEN_COLUMNS, "image", "sha256", "prompt", "split", "human")
"""Columns of our own tables, and `human`, the source of people's preferences: no reward may replace them."""
Metadata = dict[str, Any]
"""What a prompt file says of a prompt, such as GenEval's tag, include and exclude."""
Prepared = Image.Image | Tensor
"""A prepared image: the image itself, or the tensor that a network takes."""


class Reward(ABC):
    """Scores images against their prompts. Higher is better; NaN where an image cannot be scored.

    name: what its columns and files are called, in letters, digits, - and _.
    columns: what `measure` returns, the score first; NAME@LEVEL is a bin of a distribution, which no summary shows.
    range: the score's bounds. usual: where most images lie, if the bounds do not say. licence, weights: of the model it
    runs. requires: what must be installed besides diffalign. version: changes whenever scores may. source: paper or
    code that defines it. size: size of the weights. reads: what a score depends on besides the image. longest: the
    tokens that it reads of a prompt, 0 for all of them. preprocessing: how pixels become the model's input. reasons:
    after a call, why image i was not scored ("" if it was).

    Building a reward loads nothing: weights are loaded with the first image, or by `identity`, which names them.
    """

    name: str
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
    reads: tuple[str, ...] = ("prompt",)
    longest: int = 0

    preprocessing: str = "RGB"
    reasons: list[str]

    def score(self, images: list[Image.Image], prompts: list[str], metadata: list[Metadata] | None = None) -> Tensor:
        """Return the first column of `measure`: float32 [B].

        Raises DiffalignError for another number of prompts than images.
        """
        if isinstance(prompts, str) or len(prompts) != len(images):
            found = "one text" if isinstance(prompts, str) else f"{len(prompts)} prompts"
            raise DiffalignError(
                f"reward {self.name}: {found} for {len(images)} images; give a list with one for each image"
            )
        return self.measure(images, prompts, metadata)[self.columns[0]]

    @abstractmethod
    def measure(
        self, images: list[Image.Image], prompts: list[str], metadata: list[Metadata] | None = None
    ) -> dict[str, Tensor]:
        """Return every column, each float32 [B]. Raises DiffalignError if it cannot score these prompts at all."""

    def prepare(self, image: Image.Image) -> Prepared:
        """Do the part of the preprocessing that needs no model, so that decoding threads can run it."""
        return image

    def measure_prepared(
        self, items: Sequence[Any], prompts: list[str], metadata: list[Metadata] | None = None
    ) -> dict[str, Tensor]:
        """Return `measure` of what `prepare` returned."""
        return self.measure(list(items), prompts, metadata)

    def score_tensors(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        """Return the score of float pixels [B, 3, H, W] in [0, 1], float32 [B], with its gradient to the pixels.

        Raises DiffalignError if the reward is not differentiable.
        """
        raise DiffalignError(f"reward {self.name} is not differentiable; `diffalign rewards` lists those that are")

    def reason_not_scorable(self, prompt: str | None, metadata: Metadata) -> str:
        """Return why an image with this prompt cannot be scored, "" if it can. Nothing is decoded for that."""
        return "no prompt" if "prompt" in self.reads and not (prompt or "").strip() else ""

    def count_cut(self, prompts: Sequence[str]) -> int:
        """Return how many distinct prompts are longer than `longest` tokens, so that the score reads them in part."""
        unique = dict.fromkeys(prompts)
        return sum(length > self.longest for length in self.lengths(list(unique))) if self.longest and unique else 0

    def lengths(self, prompts: list[str]) -> list[int]:
        """Return the prompts' lengths in tokens, as the model counts them; needed of a reward with `longest`."""
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """Return the options that change a score."""
        return {}

    def weights_id(self) -> str:
        """Return which weights these are, with revision or fingerprint."""
        return self.weights

    def licence_id(self) -> str:
        """Return the licence of these weights."""
        return self.licence

    def provenance(self) -> dict[str, Any]:
        """Return what a score file says of the reward that judged: name, version, weights, licence and settings."""
        return {
            "reward": self.name,
            "version": self.version,
            "weights": self.weights_id(),
            "licence": self.licence_id(),
            "settings": redacted(self.options()),
            "format": 2,  # 1, without this key: weights of the class, and settings as the user gave them
        }

    def identity(self) -> dict[str, Any]:
        """Return what a score depends on besides image, prompt and metadata: equal identities give equal scores."""
        return {
            "reward": self.name,
            "version": self.version,
            "weights": self.weights_id(),
            "preprocessing": self.preprocessing,
            "reads": ["image", *self.reads],
            **({"options": redacted(self.options())} if self.options() else {}),
        }

    def free(self) -> None:
        """Release the weights; the next call loads them again."""
        return


class PreparedReward(Reward):
    """A reward that scores what `prepare` returns; subclasses define `measure_prepared`, and `measure` follows from it."""

    def measure(
        self, images: list[Image.Image], prompts: list[str], metadata: list[Metadata] | None = None
    ) -> dict[str, Tensor]:
        return self.measure_prepared([self.prepare(image) for image in images], prompts, metadata)

    @abstractmethod
    def measure_prepared(
        self, items: Sequence[Prepared], prompts: list[str], metadata: list[Metadata] | None = None
    ) -> dict[str, Tensor]:
        """Return `measure` of what `prepare` returned."""


def by_column(columns: tuple[str, ...], rows: list[tuple[float, ...]]) -> dict[str, Tensor]:
    """Return rows of values as one float32 tensor a column."""
    return {name: torch.tensor([row[i] for row in rows], dtype=torch.float32) for i, name in enumerate(columns)}
