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


def judged(out: Path, prompts: int, noise: float = 0.1, seed: int = 0, blind: bool = False) -> Path:
    """Write two pictures a prompt; the redder one is chosen, another share `noise` of the time. blind: any is chosen."""
    rng = np.random.default_rng(seed)
    groups = []
    for n in range(prompts):
        pair = coloured(rng), coloured(rng)
        first = redness(pair[0]) > redness(pair[1]) if not blind else rng.random() < 0.5
        first ^= rng.random() < noise
        values = (float(first), float(not first))
        groups.append(ImportedGroup(f"prompt {n}", tuple(map(png_bytes, pair)), values, f"row {n}"))
    write_imported(groups, out)
    return out
