"""How `train.online` draws a batch of images: from encoded prompts and seeds to what is kept of each image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from diffalign.pipelines.paths import PathSteps, draw_paths
from diffalign.pipelines.settings import SamplingSettings
from diffalign.training.preference.guided import guided_prediction
from diffalign.training.protocols import Conditioning

if TYPE_CHECKING:
    from diffalign.pipelines import Backbone

NEGATIVE = "negative_"


class Sampler(Protocol):
    """Draws images under the current role."""

    def __call__(self, conditioning: Conditioning, seeds: list[int]) -> dict[str, Tensor]:
        """Return what is kept of B images, [B, ...] each, "latents" [B, C, h, w] float32 among it."""


def guided(conditioning: Conditioning, template: Conditioning) -> Conditioning:
    """Return what `Backbone.sample_encoded` takes, from what `predict` takes of B prompts.

    template: `Backbone.encode_guided` of one prompt, whose negative part all images share.
    """
    count = len(next(iter(conditioning.values())))
    return {
        name: value.expand(count, *value.shape[1:]) if name.startswith(NEGATIVE) else conditioning[name].to(value.dtype)
        for name, value in template.items()
    }


class PipelineSampler:
    """Draws through the model's own diffusers pipeline, as `diffalign sample` does. template: as `guided` takes it."""

    def __init__(self, backbone: Backbone, settings: SamplingSettings, template: Conditioning) -> None:
        self.backbone, self.settings, self.template = backbone, settings, template

    def __call__(self, conditioning: Conditioning, seeds: list[int]) -> dict[str, Tensor]:
        encoded = guided(conditioning, self.template)
        return {"latents": self.backbone.sample_encoded(encoded, seeds, self.settings, output_type="latent")}


class PathSampler:
    """Draws by steps that draw noise, through `Backbone.predict`, and keeps the paths: "path" [B, n + 1, C, h, w].

    unconditional: what guidance steers away from; shape [C, h, w]: of a latent.
    """

    def __init__(
        self, backbone: Backbone, steps: PathSteps, unconditional: Conditioning, shape: tuple[int, ...]
    ) -> None:
        self.backbone, self.steps, self.unconditional, self.shape = backbone, steps, unconditional, shape

    def __call__(self, conditioning: Conditioning, seeds: list[int]) -> dict[str, Tensor]:
        backbone, steps = self.backbone, self.steps

        def predict(x: Tensor, t: Tensor) -> Tensor:
            return guided_prediction(backbone, x, t, conditioning, self.unconditional, steps.guidance)

        latents, states = draw_paths(backbone.process, steps, predict, seeds, self.shape)
        return {"latents": latents, "path": states}
