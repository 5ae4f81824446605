"""Datasets of pictures that somebody with a known taste has judged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from diffalign.data.imported import ImportedGroup, write_imported
from diffalign.data.writer import png_bytes


def redness(image: Image.Image) -> float:
    """Mean of R - (G + B) / 2, channels in [0, 1]."""
    red, green, blue = (np.asarray(image.convert("RGB"), dtype=np.float64) / 255).transpose(2, 0, 1)
    return float((red - (green + blue) / 2).mean())


def coloured(rng: np.random.Generator, side: int = 24) -> Image.Image:
    """A picture of one random colour with some noise."""
    colour = rng.uniform(40, 215, 3)
    return Image.fromarray((colour + rng.uniform(-30, 30, (side, side, 3))).astype(np.uint8))


def judged(out: Path, prompts: int, noise: float = 0.1, seed: int = 0, blind: bool = False, each: int = 2) -> Path:
    """Write `each` pictures a prompt, ordered by redness; another share `noise` of the time in reverse. blind: in any order."""
    rng = np.random.default_rng(seed)
    groups = []
    for n in range(prompts):
        images = [coloured(rng) for _ in range(each)]
        order = np.argsort(np.argsort([redness(image) for image in images])) if not blind else rng.permutation(each)
        order = each - 1 - order if rng.random() < noise else order
        values = tuple(float(place) / (each - 1) for place in order)
        groups.append(ImportedGroup(f"prompt {n}", tuple(map(png_bytes, images)), values, f"row {n}"))
    write_imported(groups, out)
    return out
