"""What a trunk computes half way, for a discriminator that shares it (DMD2, arXiv:2405.14867, section 4.4)."""

from typing import Any

import torch
from torch import Tensor, nn


def middle(trunk: nn.Module) -> nn.Module:
    """The bottleneck of a UNet, or the block in the middle of a transformer."""
    parts = dict(trunk.named_children())
    if "mid_block" in parts:
        return parts["mid_block"]
    blocks = list(parts["transformer_blocks"].children())
    return blocks[(len(blocks) - 1) // 2]


def predict_with_features(
    backbone: Any, noisy: Tensor, t: Tensor, conditioning: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """`backbone.predict` and the middle's features [N, positions, C] float32, from one pass; both differentiable.

    Positions are those of the image: a transformer's text tokens are left out.
    """
    found: list[Any] = []
    handle = middle(backbone.pipeline_trunk).register_forward_hook(
        lambda _module, _inputs, output: found.append(output)
    )
    try:
        prediction = backbone.predict(noisy, t, conditioning)
    finally:
        handle.remove()
    # A block of SD3 gives (text, image).
    output = found[-1][1] if isinstance(found[-1], tuple) else found[-1]
    features: Tensor = output.flatten(2).transpose(1, 2) if output.dim() == 4 else output
    return prediction, features.float()


@torch.no_grad()
def feature_width(backbone: Any, latent: Tensor, conditioning: dict[str, Tensor]) -> int:
    """C of `predict_with_features`, measured with one latent [1, C, h, w]."""
    times = torch.full((1,), 0.5 * backbone.process.span)
    return int(predict_with_features(backbone, latent, times, conditioning)[1].shape[-1])
