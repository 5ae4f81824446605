"""Prepare pixels for CLIP-like models: an exact path on PIL images, and a differentiable one on float tensors.

The exact path repeats the published preprocessing, in 8-bit PIL where the original uses it. The tensor path does the
same with float interpolation: on images without single-pixel noise it stays within 1.25 8-bit levels (`BOUND`, in units
of [0, 1]) of the exact one, which a test checks for several shapes.
"""

from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from diffalign.files.images import resized_crop

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
BOUND = 1.25 / 255
"""Largest difference of the two paths on pictures without pixel noise, before normalisation: PIL rounds to 8 bits twice."""

Rounding = Literal["floor", "round"]
"""Where an odd margin of the centre crop goes: transformers floors, torchvision (and so clip, open_clip) rounds."""


def to_tensor(image: Image.Image) -> Tensor:
    """Convert an image to float32 RGB [3, H, W] in [0, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"), dtype=np.uint8)).permute(2, 0, 1).float() / 255


def normalise(pixels: Tensor, mean: tuple[float, ...] = CLIP_MEAN, std: tuple[float, ...] = CLIP_STD) -> Tensor:
    """Return (pixels - mean) / std over the channels of [..., 3, H, W]."""
    shape = (3, 1, 1)
    return (pixels - pixels.new_tensor(mean).view(shape)) / pixels.new_tensor(std).view(shape)


def _scaled(height: int, width: int, size: int) -> tuple[int, int]:
    """Return the sides after the shorter one becomes `size`; the longer is cut to an integer, as in every original."""
    short, long = min(height, width), int(size * max(height, width) / min(height, width))
    return (size, long) if height == short else (long, size)


def _offset(margin: int, rounding: Rounding) -> int:
    return margin // 2 if rounding == "floor" else round(margin / 2)


def crop_square(image: Image.Image, size: int, rounding: Rounding) -> Tensor:
    """Resize the shorter side to `size` (bicubic, 8-bit) and crop the centre: float32 [3, size, size] in [0, 1]."""
    height, width = _scaled(image.height, image.width, size)
    left, top = _offset(width - size, rounding), _offset(height - size, rounding)
    box = (left, top, left + size, top + size)
    return to_tensor(resized_crop(image.convert("RGB"), (width, height), box, Image.Resampling.BICUBIC))


def crop_square_tensor(pixels: Tensor, size: int, rounding: Rounding) -> Tensor:
    """Do what `crop_square` does to [B, 3, H, W] in [0, 1], with gradient.

    It clamps, as 8 bits do to bicubic overshoot.
    """
    height, width = _scaled(pixels.shape[-2], pixels.shape[-1], size)
    left, top = _offset(width - size, rounding), _offset(height - size, rounding)
    return resize(pixels, height, width).clamp(0, 1)[..., top : top + size, left : left + size]


def letterbox(pixels: Tensor, size: int, antialias: bool = True) -> Tensor:
    """Resize the longer side to `size` and add black bars: [..., 3, H, W] to [..., 3, size, size].

    HPSv2's own transform works on float tensors and does not clamp, so this is both the exact and the differentiable
    path.
    """
    batched = pixels if pixels.ndim == 4 else pixels[None]
    scale = size / max(batched.shape[-2:])
    height, width = (max(1, round(side * scale)) for side in batched.shape[-2:])
    resized = resize(batched, height, width, antialias)
    top, left = (size - height) // 2, (size - width) // 2
    padded = F.pad(resized, (left, size - width - left, top, size - height - top))
    return padded if pixels.ndim == 4 else padded[0]


def resize(pixels: Tensor, height: int, width: int, antialias: bool = True) -> Tensor:
    """Resize by bicubic interpolation, without a clamp; return the same tensor if the size is right."""
    if pixels.shape[-2:] == (height, width):
        return pixels
    return F.interpolate(pixels, (height, width), mode="bicubic", align_corners=False, antialias=antialias)


def patches(pixels: Tensor, side: int, merge: int, frames: int = 2) -> Tensor:
    """Return Qwen2-VL's rows [B * patches, 3 * frames * side * side] of [B, 3, H, W].

    Merged blocks stay together, and each frame is repeated.
    """
    b, c, h, w = pixels.shape
    cells = pixels.reshape(b, c, h // side // merge, merge, side, w // side // merge, merge, side)
    rows = cells.permute(0, 2, 5, 3, 6, 1, 4, 7)  # batch, block row, block column, row, column, channel, y, x
    return rows.unsqueeze(6).expand(*rows.shape[:6], frames, side, side).reshape(-1, c * frames * side * side)
