"""Assign groups to aspect buckets, and bring images to the bucket's size.

The images of a group share their noise, so a group has one shape. Its bucket is the one nearest in aspect to most of
its images; images of another aspect are cropped to it. Nothing is flipped.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffalign.data.dataset import PreferenceDataset
from diffalign.errors import DiffalignError
from diffalign.files.images import Unreadable, displayed_size, resized_crop

Size = tuple[int, int]
"""(width, height) in pixels."""

WIDEST = 2.0
"""The largest aspect of `buckets: auto`, width to height or the reverse."""


def fit(image: Image.Image, size: Size) -> np.ndarray:
    """Return the image resized until it covers `size` and centre-cropped: uint8 [height, width, 3]."""
    width, height = size
    scale = max(width / image.width, height / image.height)
    scaled = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    left, top = (scaled[0] - width) // 2, (scaled[1] - height) // 2
    box = (left, top, left + width, top + height)
    return np.asarray(resized_crop(image, scaled, box, Image.Resampling.LANCZOS))


def to_pixels(images: list[np.ndarray]) -> Tensor:
    """Stack uint8 [H, W, 3] images into float32 [B, 3, H, W] in [0, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def bucket_sizes(
    buckets: str | Sequence[Sequence[int]], resolution: int, multiple: int, longest: int | None = None
) -> list[Size]:
    """Return the sizes that `data.buckets` allows; sides are multiples of `multiple` and at most `longest` pixels.

    `auto`: for every width the largest height with no more pixels than the square, aspects up to 2 : 1, both ways; in
    steps of 64 pixels for resolutions of 512 and above, as SDXL was trained (Podell et al. 2023, appendix I), finer
    below. Raises DiffalignError for a given size that this model cannot take.
    """
    if buckets == "none":
        return [(resolution, resolution)]
    if not isinstance(buckets, str):
        sizes = [(int(width), int(height)) for width, height in buckets]
        for width, height in sizes:
            if longest is not None and max(width, height) > longest:
                raise DiffalignError(
                    f"data.buckets: {width}x{height} is beyond the {longest} pixels a side of this model"
                )
            if width % multiple or height % multiple:
                raise DiffalignError(
                    f"data.buckets: {width}x{height} are not multiples of {multiple}, which this model needs"
                )
        return sorted(set(sizes))
    step = multiple * max(1, min(64, resolution // 8) // multiple)
    found = {(resolution, resolution)}
    for width in range(step, int(resolution * math.sqrt(WIDEST)) + step, step):
        height = resolution**2 // width // step * step
        if height and max(width / height, height / width) <= WIDEST:
            found |= {(width, height), (height, width)}
    return sorted(size for size in found if longest is None or max(size) <= longest)


def nearest(size: Size, sizes: Sequence[Size]) -> Size:
    """Return the bucket with the nearest aspect on a log scale; of equally near ones the larger, then the first."""
    aspect = math.log(size[0] / size[1])
    return min(sizes, key=lambda s: (round(abs(math.log(s[0] / s[1]) - aspect), 9), -s[0] * s[1]))


def group_sizes(dataset: PreferenceDataset, groups: list[int], sizes: list[Size]) -> list[Size]:
    """Return the bucket of each group: that of most of its images; of equally frequent ones, that of the lowest index.

    Reads the headers of the images, unless there is only one bucket.
    """
    if len(sizes) == 1:
        return [sizes[0]] * len(groups)
    ids = dataset.column("group_id")
    members = {ids[i]: set(dataset.members(ids[i])) for i in groups}
    found: dict[str, dict[int, Size]] = {group: {} for group in members}
    for rows in dataset.iter_images():
        for row in rows:
            if row.index in members.get(row.group_id, ()):
                found[row.group_id][row.index] = nearest(header_size(row.data, row.group_id, row.index), sizes)
    return [most(found[ids[i]]) for i in groups]


def most(of: dict[int, Size]) -> Size:
    """Return the most frequent size; of equally frequent ones, that of the lowest index."""
    ordered = [of[index] for index in sorted(of)]
    counts = Counter(ordered)
    return max(ordered, key=lambda size: (counts[size], -ordered.index(size)))


def header_size(data: bytes, group: str, index: int) -> Size:
    """Return width and height of an encoded image as people see it, from its header.

    Raises DiffalignError if it is no image.
    """
    try:
        return displayed_size(data)
    except Unreadable as error:
        raise DiffalignError(f"image {index} of group {group} cannot be decoded: {error}") from error


def describe(sizes: Sequence[Size]) -> dict[str, Any]:
    """Return how many groups have each size, as {"1024x1024": 12}."""
    return {f"{width}x{height}": count for (width, height), count in sorted(Counter(sizes).items())}
