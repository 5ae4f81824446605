"""Features from the middle of a trunk, for a discriminator that shares it (DMD2, arXiv:2405.14867, section 4.4)."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from diffalign.pipelines.process import NoiseProcess


class Featured(Protocol):
    """The part of a backbone that is needed here."""

    @property
    def process(self) -> NoiseProcess: ...

    def middle_block(self) -> nn.Module: ...

    def image_positions(self, features: Tensor, noisy: Tensor) -> Tensor: ...

    def predict(self, noisy: Tensor, t: Tensor, conditioning: dict[str, Tensor]) -> Tensor: ...


def predict_with_features(
    backbone: Featured, noisy: Tensor, t: Tensor, conditioning: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return `backbone.predict` and the middle block's features [N, positions, C] float32, from one pass.

    Both are differentiable. Positions are those of the image: a transformer's text tokens are left out.
    """
    found: list[Tensor | tuple[Tensor, Tensor]] = []
    handle = backbone.middle_block().register_forward_hook(lambda _module, _inputs, output: found.append(output))
    try:
        prediction = backbone.predict(noisy, t, conditioning)
    finally:
        handle.remove()
    # Some families send a batch through the network in several parts, in its order.
    parts = [backbone.image_positions(_by_position(output), noisy) for output in found]
    return prediction, torch.cat(parts).float()


def _by_position(output: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """Return what a block gives for each position, [n, positions, C]."""
    values = output[1] if isinstance(output, tuple) else output  # a block of SD3 gives (text, image)
    return values.flatten(2).transpose(1, 2) if values.dim() == 4 else values


@torch.no_grad()
def feature_width(backbone: Featured, latent: Tensor, conditioning: dict[str, Tensor]) -> int:
    """Measure C of `predict_with_features` with one latent [1, C, h, w]."""
    times = torch.full((1,), 0.5 * backbone.process.span)
    return int(predict_with_features(backbone, latent, times, conditioning)[1].shape[-1])
