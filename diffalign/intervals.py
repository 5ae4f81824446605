"""Bootstrap intervals over prompts, and what they allow to be said. Fewer than 8 prompts give no interval.

The rule stands here alone: every table, page and sentence with an interval reads it from `Interval`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

FEWEST = 8
"""The fewest prompts that give an interval. Of fewer, resampling sees too few values, and its interval is too narrow."""
LEVEL = (0.025, 0.975)


@dataclass(frozen=True)
class Interval:
    """The 95% interval of a mean over `count` prompts (or another `unit`); it has no ends where they are too few."""

    count: int
    low: float | None
    high: float | None
    unit: str = "prompts"

    def __post_init__(self) -> None:
        # Files of earlier versions hold the ends of few prompts, too.
        if self.count < FEWEST or self.low is None or self.high is None or not np.isfinite([self.low, self.high]).all():
            object.__setattr__(self, "low", None)
            object.__setattr__(self, "high", None)

    def side(self, of: float = 0.0) -> int:
        """Return 1 if the interval lies above `of`, -1 if it lies below, and 0 if it holds it or there is none."""
        if self.low is None or self.high is None:
            return 0
        return int(self.low > of) - int(self.high < of)

    @property
    def tone(self) -> str:
        """The colour of a difference: "good" or "bad" where the interval excludes 0, else ""."""
        return {1: "good", -1: "bad", 0: ""}[self.side()]

    def words(self, form: str = "+.3f") -> str:
        """Return `+0.100 to +0.300`, or why there is no interval. form: a number's format."""
        if self.low is None or self.high is None:
            return f"too few {self.unit} ({self.count}) for an interval" if self.count < FEWEST else "no interval"
        return f"{self.low:{form}} to {self.high:{form}}"

    def verdict(self, better: str = "better", worse: str = "worse") -> str:
        """Return in words what a difference with this interval allows to be said."""
        if self.low is None or self.high is None:
            return f"too few {self.unit} to tell"
        return {1: better, -1: worse, 0: "no difference seen"}[self.side()]


def interval_in(row: Mapping[str, float | None], form: str = "") -> Interval:
    """Return an interval of a comparison as it stands in eval.json. form: "" (of the difference) or "win_"."""
    return Interval(int(row["prompts"] or 0), row[f"{form}low"], row[f"{form}high"])


Statistic = Callable[[np.ndarray], np.ndarray]
"""What is computed from means [resamples, columns], one value for each row: [resamples, values]."""


def bootstrap(
    values: np.ndarray,
    statistic: Statistic = lambda means: means,
    *,
    seed: int = 0,
    resamples: int = 10_000,
    unit: str = "prompts",
) -> list[Interval]:
    """Return the interval of every value that `statistic` computes from the means of `values` [N prompts, columns].

    Prompts are resampled with replacement; without `statistic` the values are the means themselves.
    """
    count = len(values)
    if count < FEWEST:
        return [Interval(count, None, None, unit) for _ in statistic(values[:1])[0]]
    ends = np.quantile(statistic(_resampled_means(values, seed, resamples)), LEVEL, axis=0)
    return [Interval(count, float(low), float(high), unit) for low, high in ends.T]


def share_interval(
    right: np.ndarray, groups: Sequence[str], *, seed: int = 0, resamples: int = 10_000, unit: str = "prompts"
) -> Interval:
    """Return the interval of the mean of `right` [N], resampling whole groups: rows of one prompt share their images.

    groups: the group of each row, N names.
    """
    names = {name: n for n, name in enumerate(dict.fromkeys(groups))}
    place = np.array([names[g] for g in groups], dtype=np.int64)
    sums_and_sizes = np.stack([np.bincount(place, right), np.bincount(place)], axis=1)
    share = lambda means: means[:, :1] / means[:, 1:]  # noqa: E731
    return bootstrap(sums_and_sizes, share, seed=seed, resamples=resamples, unit=unit)[0]


def exact_interval(hits: int, count: int, unit: str) -> Interval:
    """Return the interval of a share of independent cases (Clopper and Pearson 1934), which holds also where all are equal."""
    if count < FEWEST:
        return Interval(count, None, None, unit)
    from scipy.stats import binomtest

    ends = binomtest(hits, count).proportion_ci(LEVEL[1] - LEVEL[0], method="exact")
    return Interval(count, float(ends.low), float(ends.high), unit)


def _resampled_means(values: np.ndarray, seed: int, resamples: int, chunk: int = 500) -> np.ndarray:
    """Return means over resampled rows, [resamples, columns], computed in chunks to save memory."""
    rng = np.random.default_rng(seed)
    means = []
    for start in range(0, resamples, chunk):
        rows = rng.integers(len(values), size=(min(chunk, resamples - start), len(values)))
        means.append(values[rows].mean(axis=1))
    return np.concatenate(means)
