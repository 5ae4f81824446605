"""Types that the trainers share, such as what they train on, which a caller may bring as an object of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

if TYPE_CHECKING:
    from diffalign.data.training_source import Batch

PlainConfig = dict[str, object]
"""A resolved config as JSON would have it, nested."""

Say = Callable[[str], None]
PlainRow = dict[str, float | None]
"""A row of metrics.jsonl as JSON has it: null for a number that is not finite."""
ValidationRow = dict[str, Any]
"""A row of validation.jsonl: the step, means by score, and the images that were drawn."""
Parameters = dict[str, nn.Parameter]
"""Trained parameters by stable name."""
Weights = dict[str, Tensor]
"""Tensors of the parameters' names and shapes, such as their moving average."""
Conditioning = dict[str, Tensor]
"""What a network is conditioned on, [N, ...] each; from `Backbone.encode_prompts`."""
LatentScores = Callable[[Tensor, list[int]], dict[str, Tensor]]
"""Latents [N, C, h, w] and their prompts' indices [N] -> scores by reward, [N] each, NaN where there is none."""
DifferentiableScore = Callable[[Tensor, list[int]], Tensor]
"""Latents with a gradient and their prompts' indices -> a weighted score [N], with a gradient to the latents."""


class GroupSource(Protocol):
    """Groups of ranked images, as `diffalign.data.training_source.TrainingSource` gives them."""

    @property
    def rewards(self) -> Tensor:
        """[groups, K]: labels, NaN where there is none."""

    @property
    def mask(self) -> Tensor:
        """[groups]: False where a group has fewer than two images."""

    @property
    def group_ids(self) -> list[str]: ...

    @property
    def buckets(self) -> list[int]:
        """A number for each group; only groups of one number have one shape and may share a micro-batch."""

    @property
    def unconditional(self) -> Conditioning:
        """The empty prompt's conditioning, [1, ...] each."""

    def __len__(self) -> int: ...

    def batch(self, indices: list[int]) -> Batch:
        """Return the groups at these positions, in this order."""

    def content(self) -> str:
        """Return a hash of the latents' and embeddings' sources."""


class Prompts(Protocol):
    """Prompts without images, as `diffalign.training.prompt_source.PromptSource` gives them."""

    @property
    def ids(self) -> list[str]: ...

    @property
    def unconditional(self) -> Conditioning:
        """What guidance steers away from, [1, ...] each."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int]) -> Conditioning:
        """Return the conditioning of these prompts, [B, ...] each, on the CPU."""


class RealBatches(Protocol):
    """Real images, as `diffalign.training.distillation.real_images.RealImages` gives them."""

    def batch(self, numbers: Sequence[int]) -> tuple[Tensor, Conditioning]:
        """Return latents [N, C, h, w] and conditioning of images n modulo how many there are."""
