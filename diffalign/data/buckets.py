"""Aspect buckets: which size each group's pictures are brought to, and how.

A group never mixes shapes, since its images share one noise. So a group has one bucket: that of most of its images, by
the nearest aspect. Images of another aspect are cropped into it. Nothing is ever flipped.
"""

import io
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

Size = tuple[int, int]
"""(width, height) in pixels."""

WIDEST = 2.0


def fit(image: Image.Image, size: Size) -> np.ndarray:
    """Resized so that it covers `size`, then centre-cropped: uint8 [height, width, 3]."""
    width, height = size
    scale = max(width / image.width, height / image.height)
    scaled = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    if scaled != image.size:
        image = image.resize(scaled, Image.Resampling.LANCZOS)
    left, top = (scaled[0] - width) // 2, (scaled[1] - height) // 2
    return np.asarray(image.crop((left, top, left + width, top + height)))


def to_pixels(images: list[np.ndarray]) -> Tensor:
    """uint8 [H, W, 3] each -> float32 [B, 3, H, W] in [0, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def bucket_sizes(
    buckets: str | Sequence[Sequence[int]], resolution: int, multiple: int, longest: int | None = None
) -> list[Size]:
    """The sizes that `data.buckets` allows. `multiple`: of what the model's sides are multiples; `longest`: its limit.

    auto: for every width, the largest height with no more pixels than the square, aspects up to 2 : 1, both ways; in
    steps of 64 pixels at 512 and above, as SDXL was trained (Podell et al. 2023, appendix I), finer below.
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
    """The bucket whose aspect is nearest on a log scale; of equally near ones the larger, then the first."""
    aspect = math.log(size[0] / size[1])
    return min(sizes, key=lambda s: (round(abs(math.log(s[0] / s[1]) - aspect), 9), -s[0] * s[1]))


def group_sizes(dataset: PreferenceDataset, groups: list[int], sizes: list[Size]) -> list[Size]:
    """The bucket of each group: of most of its images; where two are as frequent, that of the image with the lower index.

    Reads the pictures' headers, unless there is but one bucket.
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
    """The commonest size by member; of equally common ones that of the lowest index."""
    ordered = [of[index] for index in sorted(of)]
    counts = Counter(ordered)
    return max(ordered, key=lambda size: (counts[size], -ordered.index(size)))


def header_size(data: bytes, group: str, index: int) -> Size:
    """Width and height of an encoded picture; nothing is decoded."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DiffalignError(f"image {index} of group {group} cannot be decoded: {error}") from error


def describe(sizes: Sequence[Size]) -> dict[str, Any]:
    """How many groups each size has, for what is said and printed."""
    return {f"{width}x{height}": count for (width, height), count in sorted(Counter(sizes).items())}
