"""VAEs of several kinds behind one interface: images in [0, 1] to the latents that a trunk takes, and back.

A kind is chosen by a family (`Family.vae_kind`) and holds the VAE's config alone, since the module may be freed or moved.
Shapes: pixels [B, 3, H, W]; latents [B, C, h, w].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffusers import ModelMixin


class NormalVAE:
    """A VAE that encodes an image to a normal distribution over latents (AutoencoderKL).

    A family whose VAE differs overrides `posterior`, `pixels`, `scaling` or `channels`.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    @property
    def channels(self) -> int:
        """C of the trunk's latents."""
        return int(self.config["latent_channels"])

    def posterior(self, module: ModelMixin, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Encode pixels in [-1, 1]: mean and standard deviation, [B, C, h, w] each, in the VAE's own units."""
        found = module.encode(pixels).latent_dist
        return found.mean, found.std

    def pixels(self, module: ModelMixin, latents: Tensor) -> Tensor:
        """Decode latents in the VAE's own units to pixels in [-1, 1]."""
        image: Tensor = module.decode(latents, return_dict=False)[0]
        return image

    def scaling(self, module: ModelMixin) -> tuple[Tensor | float, Tensor | float]:
        """Return offset and factor, numbers or [1, C, 1, 1]: trunk's latents = (VAE's latents - offset) * factor."""
        factor = self.config.get("scaling_factor") or 1.0
        mean, std = self.config.get("latents_mean"), self.config.get("latents_std")
        if mean is not None and std is not None:
            offset, spread = (torch.tensor(values).view(1, -1, 1, 1).to(module.device) for values in (mean, std))
            return offset, factor / spread
        return self.config.get("shift_factor") or 0.0, factor

    def encode(self, module: ModelMixin, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Encode pixels in [0, 1]: mean and standard deviation of the trunk's latents, [B, C, h, w] float32 each."""
        mean, std = self.posterior(module, pixels.to(module.dtype) * 2.0 - 1.0)
        offset, factor = self.scaling(module)
        return (mean.float() - offset) * factor, std.float() * factor

    def decode(self, module: ModelMixin, latents: Tensor) -> Tensor:
        """Decode the trunk's latents to pixels in [0, 1], float32; differentiable."""
        offset, factor = self.scaling(module)
        image = self.pixels(module, (latents.float() / factor + offset).to(module.dtype))
        return (image.float() / 2.0 + 0.5).clamp(0.0, 1.0)


class PlainVAE(NormalVAE):
    """An autoencoder that encodes an image to one latent, without a spread (AutoencoderDC)."""

    def posterior(self, module: ModelMixin, pixels: Tensor) -> tuple[Tensor, Tensor]:
        latent = module.encode(pixels).latent
        return latent, torch.zeros_like(latent)


class FrameVAE(NormalVAE):
    """A video VAE that takes an image as its only frame, [B, 3, 1, H, W] (AutoencoderKLQwenImage)."""

    @property
    def channels(self) -> int:
        return int(self.config["z_dim"])

    def posterior(self, module: ModelMixin, pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = super().posterior(module, pixels[:, :, None])
        return mean[:, :, 0], std[:, :, 0]

    def pixels(self, module: ModelMixin, latents: Tensor) -> Tensor:
        return super().pixels(module, latents[:, :, None])[:, :, 0]
