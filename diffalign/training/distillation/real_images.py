"""Real images and their prompts for the adversarial part of distillation: encoded once, kept in memory."""

from collections.abc import Iterable, Sequence
from itertools import islice

import torch
from torch import Tensor

from diffalign.pipelines import Backbone
from diffalign.training.protocols import Conditioning

AT_ONCE = 8


class RealImages:
    """Latents of real images, and their prompts' conditioning.

    images: prompts with pixels [3, H, W] float32 in [0, 1], all of one size; at least one, read as they are encoded.

    An SDXL latent at 1024 px takes 0.13 MB and its prompt 0.3 MB.
    """

    def __init__(self, backbone: Backbone, images: Iterable[tuple[str, Tensor]]) -> None:
        latents, encoded, left = [], [], iter(images)
        while part := list(islice(left, AT_ONCE)):
            prompts, pixels = zip(*part, strict=True)
            latents.append(backbone.encode_images(torch.stack(pixels)).cpu().half())
            encoded.append(backbone.encode_prompts(prompts))
        self.latents = torch.cat(latents)
        self.conditioning = {name: torch.cat([part[name] for part in encoded]) for name in encoded[0]}

    def batch(self, numbers: Sequence[int]) -> tuple[Tensor, Conditioning]:
        """Return latents [N, C, h, w] float32 and conditioning, on the CPU, of images n modulo how many there are."""
        rows = [n % len(self.latents) for n in numbers]
        return self.latents[rows].float(), {name: values[rows] for name, values in self.conditioning.items()}
