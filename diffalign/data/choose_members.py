"""Choose which images of a group count, and in which split its prompt falls, from scores, hashes and texts alone."""

from dataclasses import dataclass

import numpy as np

from diffalign.draws import draw
from diffalign.errors import DiffalignError


@dataclass(frozen=True)
class Limit:
    """Bounds for a score: images below `low`, above `high` or without a score of `source` do not count."""

    source: str
    low: float | None = None
    high: float | None = None

    def holds(self, values: np.ndarray) -> np.ndarray:
        """Return bool [K]: whether each score lies within the bounds."""
        low = -np.inf if self.low is None else self.low
        high = np.inf if self.high is None else self.high
        return np.asarray(np.isfinite(values) & (values >= low) & (values <= high))


def choose_members(values: np.ndarray, how: str, k: int | None, generator: np.random.Generator) -> np.ndarray:
    """Return the positions of the images that count, ascending. values [K]: higher is better; NaN never counts.

    `extremes`: the best ceil(k / 2) and the worst floor(k / 2). `random`: any k. `variance`: the k with the largest
    variance (D3S, arXiv 2509.22115), i from the top and k - i from the bottom for the best i. Ties are broken at
    random.
    """
    known = np.flatnonzero(np.isfinite(values))
    n = len(known)
    if how == "all" or k is None or k >= n:
        return known
    order = known[generator.permutation(n)]  # the position of an image must not decide between equals
    if how == "random":
        return np.sort(order[:k])
    ranked = order[np.argsort(-values[order], kind="stable")]
    if how == "extremes":
        return np.sort(np.concatenate([ranked[: k - k // 2], ranked[n - k // 2 :]]))
    if how == "variance":
        splits = [np.concatenate([ranked[:i], ranked[n - (k - i) :]]) for i in range(k + 1)]
        spread = [np.var(values[chosen]) for chosen in splits]
        return np.sort(splits[int(np.argmax(spread))])
    raise DiffalignError(f"rank.choose={how}: unknown; all, extremes, random or variance")


def near_duplicates(hashes: np.ndarray, values: np.ndarray, distance: int) -> np.ndarray:
    """Return bool [K]: images whose 64-bit hash differs from that of a better image by at most `distance` bits."""
    order = np.argsort(-np.nan_to_num(values, nan=-np.inf), kind="stable")
    duplicate = np.zeros(len(values), dtype=bool)
    kept: list[int] = []
    for i in order:
        bits = [int(hashes[i] ^ hashes[j]).bit_count() for j in kept]
        if any(b <= distance for b in bits):
            duplicate[i] = True
        else:
            kept.append(int(i))
    return duplicate


def split_of(prompt: str, shares: dict[str, float], seed: int) -> str:
    """Return the split of a prompt. Its text alone decides, so no prompt is ever in two splits.

    Case and spaces are ignored. `shares`: the share of prompts in each split except "train", which gets the rest.
    """
    at = float(draw(seed, "split", group=" ".join(prompt.casefold().split())).random())
    for name, share in shares.items():
        if at < share:
            return name
        at -= share
    return "train"
