"""Measure what a reward alone does not show: diversity within a prompt, and a score corrected for lost quality."""

from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image

from diffalign.errors import DiffalignError
from diffalign.rewards.aggregate import corrected_score

SIDE = 32


def diversity(path_of: Callable[[int, int], Path], prompts: int, seeds: int) -> np.ndarray:
    """Return the mean distance between a prompt's images, [prompts, 1] in [0, 1].

    The distance is the root mean square over the pixels of 32 x 32 thumbnails. It needs no network and represents
    layout and colour, not style; a fall means that seeds no longer make a difference.
    """
    found = np.full((prompts, 1), np.nan)
    for p in range(prompts):
        small = []
        for k in range(seeds):
            with Image.open(path_of(p, k)) as image:
                resized = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
            small.append(np.asarray(resized, dtype=np.float64) / 255)
        pairs = [np.sqrt(np.mean((a - b) ** 2)) for a, b in combinations(small, 2)]
        if pairs:
            found[p, 0] = np.mean(pairs)
    return found


def corrected(
    scores: dict[str, np.ndarray], reward: str, quality: list[str], u0: float = 3.0, c: float = 0.2
) -> np.ndarray:
    """Return `rewards.aggregate.corrected_score` of every image: `reward` is r, u the mean of the `quality` columns.

    Raises DiffalignError for a column that is not there.
    """
    for name in (reward, *quality):
        if name not in scores:
            raise DiffalignError(f"corrected: no score {name!r}; there are {', '.join(scores)}")
    return corrected_score(scores[reward], np.mean([scores[name] for name in quality], axis=0), centre=u0, offset=c)
