"""Turn the votes on a group of images into one number an image: its share of won comparisons."""

from collections.abc import Iterable, Sequence

import numpy as np


def won_shares(votes: Iterable[tuple[Sequence[int], Sequence[int]]], count: int) -> np.ndarray:
    """Return the share of won comparisons of each of `count` images, [count] in [0, 1]; NaN for one that has none.

    votes: images of a vote, as numbers below `count`, and their ranks, of which 1 is the best. A vote compares every two
    of its images; a tie is half a win for both. Shares are of one scale only within images that a chain of comparisons
    connects: of several such sets the largest counts, of equally large ones the first, and the others get NaN.
    """
    won, met = np.zeros((count, count)), np.zeros((count, count))
    for images, ranks in votes:
        for a, rank in zip(images, ranks, strict=True):
            for b, other in zip(images, ranks, strict=True):
                if a != b:
                    won[a, b] += 0.5 * (1 + (rank < other) - (rank > other))
                    met[a, b] += 1
    from scipy.sparse.csgraph import connected_components  # here, since ranking without votes needs no SciPy

    compared = met.sum(axis=1)
    _, which = connected_components(met, directed=False)
    sizes = np.bincount(which, weights=compared > 0, minlength=1)
    counts = (compared > 0) & (which == sizes.argmax())
    return np.where(counts, won.sum(axis=1) / np.maximum(compared, 1), np.nan)
