"""Run image processors of image-text models on float tensors, so that a score has a gradient to the pixels.

The processors of transformers take 8-bit images and cut the graph. Each function here does the same to float pixels [B,
3, H, W] in [0, 1]. Values are equal where nothing is resized; where something is, they are within `pixels.BOUND` (1.25
8-bit levels, before normalisation) on images without pixel noise, since the original rounds to 8 bits after its resize.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from diffalign.errors import DiffalignError
from diffalign.rewards.pixels import normalise, patches

if TYPE_CHECKING:
    from transformers import BaseImageProcessor

TensorProcessor = Callable[["BaseImageProcessor", Tensor], dict[str, Tensor]]
"""A function from (image processor, pixels [B, 3, H, W]) to the model's image inputs, float32."""


def qwen_vl(processor: BaseImageProcessor, pixels: Tensor) -> dict[str, Tensor]:
    """Prepare inputs for Qwen2-VL, 2.5-VL, 3-VL, 3.5: sides to multiples of patch * merge, area within bounds, patches."""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    height, width = pixels.shape[-2:]
    if processor.do_resize:
        height, width = smart_resize(
            height,
            width,
            factor=processor.patch_size * processor.merge_size,
            min_pixels=processor.size["shortest_edge"],
            max_pixels=processor.size["longest_edge"],
        )
    sized = _normalised(processor, _resized(processor, pixels, height, width))
    side = processor.patch_size
    grid = torch.tensor([[1, height // side, width // side]] * len(pixels), device=pixels.device)
    rows = patches(sized, side, processor.merge_size, processor.temporal_patch_size)
    return {"pixel_values": rows, "image_grid_thw": grid}


def fixed_size(processor: BaseImageProcessor, pixels: Tensor) -> dict[str, Tensor]:
    """Prepare inputs for Gemma 3 and other SigLIP towers: resize to one size without keeping the aspect.

    Raises DiffalignError for pan-and-scan crops.
    """
    if getattr(processor, "do_pan_and_scan", None):
        raise DiffalignError(
            "pan-and-scan makes several crops of a picture and has no gradient here; set do_pan_and_scan to false"
        )
    height, width = pixels.shape[-2:]
    if processor.do_resize:
        height, width = processor.size["height"], processor.size["width"]
    return {"pixel_values": _normalised(processor, _resized(processor, pixels, height, width))}


FAMILIES: dict[str, TensorProcessor] = {
    "Qwen2VLImageProcessor": qwen_vl,
    "Qwen2VLImageProcessorPil": qwen_vl,
    "Gemma3ImageProcessor": fixed_size,
    "Gemma3ImageProcessorPil": fixed_size,
}
"""By the class of the image processor that a model's folder names."""


def tensor_inputs(processor: BaseImageProcessor, pixels: Tensor) -> dict[str, Tensor]:
    """Return the image inputs of float pixels [B, 3, H, W] in [0, 1], float32, with their gradient.

    Raises DiffalignError for an image processor that is not in FAMILIES.
    """
    kind = type(processor).__name__
    if kind not in FAMILIES:
        raise DiffalignError(
            f"{kind} has no differentiable form here; there are {', '.join(FAMILIES)}: score pictures instead of tensors"
        )
    return FAMILIES[kind](processor, pixels if pixels.dtype == torch.float64 else pixels.float())


def _resized(processor: BaseImageProcessor, pixels: Tensor, height: int, width: int) -> Tensor:
    """Resize with the processor's filter, clamped as 8 bits clamp bicubic overshoot; unchanged if the size is right."""
    if pixels.shape[-2:] == (height, width):
        return pixels
    mode = {2: "bilinear", 3: "bicubic"}.get(int(processor.resample))
    if mode is None:
        raise DiffalignError(
            f"{type(processor).__name__} resizes with filter {processor.resample}; bilinear and bicubic have a gradient here"
        )
    return F.interpolate(pixels, (height, width), mode=mode, align_corners=False, antialias=True).clamp(0, 1)


def _normalised(processor: BaseImageProcessor, pixels: Tensor) -> Tensor:
    return (
        normalise(pixels, tuple(processor.image_mean), tuple(processor.image_std)) if processor.do_normalize else pixels
    )
