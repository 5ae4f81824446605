"""Make items of what Python code holds: paths, images of Pillow, arrays of numpy, tensors of torch."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.files.images import Unreadable, as_seen
from diffalign.scoring.items import Item
from diffalign.scoring.sources import Prompting, collect
from diffalign.terminal import counted

Pixels: TypeAlias = "Image.Image | np.ndarray | Tensor"
Picture: TypeAlias = "str | Path | Pixels"
"""One image, or a batch: a path (also of a folder, a glob, an archive, a dataset), an image, an array, a tensor."""
Given = TypeVar("Given")
CHANNELS = (1, 3, 4)
HALF_A_LEVEL = 0.5 / 255
"""How far rounding may take float pixels beyond 0 and 1."""
_LOADING = threading.Lock()


@dataclass(frozen=True)
class PixelOrigin:
    """An image in memory: of Pillow, or an array [H, W] or [H, W, C], 8 bits or float in [0, 1].

    It is read as the bytes of an uncompressed file, so that it is hashed, decoded and scored as any file is.
    """

    pixels: Pixels

    def read(self) -> bytes:
        if isinstance(self.pixels, Image.Image):
            # Pillow reads an opened file at first use, and the same image may be given twice.
            with _LOADING:
                image = as_seen(self.pixels)
        else:
            image = as_seen(_image_of(self.pixels))
        return b"P6 %d %d 255\n" % image.size + image.tobytes()


def items_of(
    images: Picture | Iterable[Picture],
    prompts: str | Sequence[str | None] | None = None,
    metadata: Sequence[Mapping[str, object]] | None = None,
) -> list[Item]:
    """Return the items of images in the order given, with their prompts and metadata.

    prompts: one for all, one for each image, or None for those that `diffalign score` finds beside files. metadata: of each
    image, what a reward reads besides the prompt. An image in memory is called `image N`, counted from 0. Raises
    DiffalignError for a source without images, an array of another shape or type, and another number of prompts than images.
    """
    single = isinstance(images, (str, bytes, Path, Image.Image, np.ndarray, Tensor, Mapping))
    given = [images] if single or not isinstance(images, Iterable) else list(images)
    items: list[Item] = []
    for one in given:
        if isinstance(one, (str, Path)):
            items += collect([str(one)], Prompting(prompts if isinstance(prompts, str) else None))
            continue
        for pixels in _single(one, len(items)):
            name = f"image {len(items)}"
            items.append(Item(name, name, PixelOrigin(pixels), prompts if isinstance(prompts, str) else None))
    if not items:
        raise DiffalignError("images: none is given")
    twice = [name for name, n in Counter(item.name for item in items).items() if n > 1]
    if twice:
        raise DiffalignError(f"{twice[0]!r} is given twice; name each image once")
    if prompts is not None and not isinstance(prompts, str):
        texts = _one_each("prompts", prompts, (str, type(None)), "text", items)
        items = [
            replace(item, prompt=item.prompt if one is None else one) for item, one in zip(items, texts, strict=True)
        ]
    if metadata is not None:
        facts = _one_each("metadata", metadata, Mapping, "mapping", items)
        items = [replace(item, metadata={**item.metadata, **more}) for item, more in zip(items, facts, strict=True)]
    return items


def _one_each(
    what: str, given: Iterable[Given], kind: type | tuple[type, ...], called: str, items: list[Item]
) -> list[Given]:
    """Return what was given for each image. Raises DiffalignError for another number or another kind."""
    if not isinstance(given, Iterable) or isinstance(given, (str, bytes, Mapping)):
        raise DiffalignError(f"{what}: {type(given).__name__} is no list; give a list with one {called} for each image")
    found = list(given)
    if len(found) != len(items):
        raise DiffalignError(
            f"{what}: {len(found)} for {counted(len(items), 'image')}; give one {called} for each image"
        )
    wrong = next((number for number, one in enumerate(found) if not isinstance(one, kind)), None)
    if wrong is not None:
        raise DiffalignError(f"{what}: that of image {wrong} is {type(found[wrong]).__name__}; give a {called}")
    return found


def _single(pixels: object, number: int) -> Iterator[Pixels]:
    """Yield the images of an image, an array or a tensor: arrays as [H, W] or [H, W, C]. number: of the first."""
    if isinstance(pixels, Image.Image):
        yield pixels
        return
    if not isinstance(pixels, (np.ndarray, Tensor)):
        raise DiffalignError(
            f"image {number}: {type(pixels).__name__} is no image; give a path, an image of Pillow, an array or a tensor"
        )
    if isinstance(pixels, Tensor) and (pixels.is_meta or pixels.layout != torch.strided):
        raise DiffalignError(
            f"image {number}: a tensor on device meta or a sparse one; give a dense tensor with values"
        )
    floating = pixels.is_floating_point() if isinstance(pixels, Tensor) else pixels.dtype.kind == "f"
    if not floating and pixels.dtype not in (torch.uint8, np.uint8):
        raise DiffalignError(f"image {number}: pixels are {pixels.dtype}; uint8, or float from 0 to 1, is needed")
    if pixels.ndim == 4:
        for one in pixels:
            yield _channels_last(one, number)
    else:
        yield _channels_last(pixels, number)


def _channels_last(pixels: np.ndarray | Tensor, number: int) -> np.ndarray | Tensor:
    """Return an image as [H, W] or [H, W, C]. Where both ends could be channels, a tensor's are first, an array's last."""
    shape = tuple(pixels.shape)
    ends = (0, -1) if isinstance(pixels, Tensor) else (-1, 0)
    place = next((end for end in ends if len(shape) == 3 and shape[end] in CHANNELS), None)
    if len(shape) == 2 or place == -1:
        return pixels
    if place is None:
        raise DiffalignError(
            f"image {number}: shape {list(shape)}; [H, W], [H, W, C] or [C, H, W] with 1, 3 or 4 channels is needed, or a "
            "batch of these"
        )
    return pixels.permute(1, 2, 0) if isinstance(pixels, Tensor) else pixels.transpose(1, 2, 0)


def _image_of(pixels: np.ndarray | Tensor) -> Image.Image:
    """Return the image of an array [H, W] or [H, W, C]. Raises Unreadable for floats that are no pixels."""
    if isinstance(pixels, Tensor):
        pixels = pixels.detach().cpu()
        pixels = (pixels.double() if pixels.is_floating_point() else pixels).numpy()
    if pixels.dtype != np.uint8:
        low, high = (float(pixels.min()), float(pixels.max())) if pixels.size else (0.0, 0.0)
        if math.isnan(low):
            raise Unreadable("pixels that are not a number (NaN)")
        if low < -HALF_A_LEVEL or high > 1 + HALF_A_LEVEL:
            raise Unreadable(f"float pixels from {low:.4g} to {high:.4g}; they must lie between 0 and 1")
        pixels = (255 * pixels.astype(np.float64)).round().clip(0, 255).astype(np.uint8)
    if not pixels.size:
        raise Unreadable("an image without pixels")
    squeezed = pixels[:, :, 0] if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels
    return Image.fromarray(np.ascontiguousarray(squeezed))
