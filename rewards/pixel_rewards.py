"""Two rewards of the pixels alone, with nothing to download: controls for a pipeline, and baits for reward hacking.

A method that is said to align should be able to raise them, and a report that lists them beside a learnt reward shows
when the learnt one rose through mere contrast or flatness.
"""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from diffalign.errors import DiffalignError
from diffalign.files.images import encoded
from diffalign.rewards.base import Metadata, Reward
from diffalign.rewards.pixels import to_tensor

STRIP = 16_000_000
GREY = (0.299, 0.587, 0.114)
"""ITU-R BT.601, Pillow's own weights for mode L."""


class JpegCompressibility(Reward):
    """Minus the size of the image as a JPEG, in kilobytes of 1000 bytes (DDPO, Black et al. 2023, section 5.1).

    Compare images of one size only: a larger image takes more bytes. `sign=-1` rewards size instead (DDPO's
    incompressibility).
    """

    name = "jpeg_compressibility"
    columns = ("jpeg_compressibility",)
    range = (-float("inf"), 0.0)
    licence = "Apache-2.0 (this project)"
    weights = "none"
    source = "arXiv 2305.13301"
    reads = ()

    def __init__(self, quality: int = 95, sign: int = 1) -> None:
        if not 1 <= quality <= 100 or sign not in (-1, 1):
            raise DiffalignError(f"reward {self.name}: quality {quality} must be 1 to 100, and sign {sign} 1 or -1")
        self.quality, self.sign = quality, sign
        self.reasons = []

    def options(self) -> dict[str, Any]:
        return {"quality": self.quality, "sign": self.sign}

    def measure(
        self, images: list[Image.Image], prompts: list[str], metadata: list[Metadata] | None = None
    ) -> dict[str, Tensor]:
        self.reasons = [""] * len(images)
        sizes = []
        for image in images:
            sizes.append(-self.sign * len(encoded(image.convert("RGB"), "JPEG", quality=self.quality)) / 1000)
        return {self.columns[0]: torch.tensor(sizes, dtype=torch.float32)}


def _luma(pixels: Tensor) -> Tensor:
    """Return the grey of pixels: [B, 3, H, W] -> [B, 1, H, W] float32."""
    return (pixels.float() * pixels.new_tensor(GREY).view(3, 1, 1)).sum(1, keepdim=True)


def _grey(image: Image.Image) -> Tensor:
    """Return the grey of an image, [1, 1, H, W]."""
    boxes = [(0, top, image.width, bottom) for top, bottom in _strips(image.height, image.width)]
    return torch.cat([_luma(to_tensor(image.crop(box))[None]) for box in boxes], dim=2)


def _sharpness(grey: Tensor) -> Tensor:
    """Return the log of the Laplacian's variance, [B, 1, H, W] -> [B]."""
    kernel = grey.new_tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])[None, None]
    strips = _strips(grey.shape[2] - 2, grey.shape[3])
    inner = torch.cat([F.conv2d(grey[:, :, top : bottom + 2], kernel) for top, bottom in strips], dim=2)
    return torch.log10(1e-4 + inner.flatten(1).var(1, unbiased=False))


def _strips(height: int, width: int) -> list[tuple[int, int]]:
    """Return the rows (first, last + 1) of strips of at most `STRIP` pixels: a large image at once would take gigabytes."""
    rows = max(1, STRIP // width)
    return [(top, min(top + rows, height)) for top in range(0, height, rows)]


class Sharpness(Reward):
    """log10(1e-4 + variance of the Laplacian) of the grey image in [0, 1] (Pech-Pacheco et al. 2000; the log is ours).

    The 4-neighbour Laplacian over inner pixels. Noise counts as sharp, which makes it a bait.
    """

    name = "sharpness"
    columns = ("sharpness",)
    range = (-4.0, float(np.log10(16.0)))
    licence = "Apache-2.0 (this project)"
    weights = "none"
    source = "ICPR 2000, Diatom autofocusing in brightfield microscopy"
    reads = ()
    differentiable = True

    def __init__(self) -> None:
        self.reasons = []

    def measure(
        self, images: list[Image.Image], prompts: list[str], metadata: list[Metadata] | None = None
    ) -> dict[str, Tensor]:
        self.reasons = ["" if min(image.size) >= 3 else "smaller than 3 x 3 pixels" for image in images]
        scores = [
            float("nan") if reason else float(_sharpness(_grey(image)))
            for image, reason in zip(images, self.reasons, strict=True)
        ]
        return {self.columns[0]: torch.tensor(scores, dtype=torch.float32)}

    def score_tensors(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        return _sharpness(_luma(pixels))
