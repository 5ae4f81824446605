"""Agreement of predicted scores and distributions with people. numpy, float64.

PLCC, SRCC, human-preference accuracy (HPA) and its margin form are those of arXiv 2606.09076v2; calibration and CRPS judge
the distribution and not only its mean.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVELS = np.linspace(1.0, 5.0, 9)
MARGIN = 0.5


def plcc(predicted: np.ndarray, human: np.ndarray) -> float:
    """Return Pearson's correlation; NaN where one of them is constant or there are fewer than two."""
    a, b = np.asarray(predicted, float), np.asarray(human, float)
    if len(a) < 2:
        return float("nan")
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale > 0 else float("nan")


def average_ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(np.asarray(values, float), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def srcc(predicted: np.ndarray, human: np.ndarray) -> float:
    """Return Spearman's correlation: Pearson's of average ranks."""
    return plcc(average_ranks(predicted), average_ranks(human))


def preference_accuracy(
    predicted: np.ndarray, human: np.ndarray, prompts: Sequence[str], margin: float = 0.0
) -> tuple[float, int]:
    """Return HPA and the number of pairs: pairs of one prompt whose human scores differ by more than `margin`.

    A pair is right where (mu_a - mu_b)(s_a - s_b) > 0, so a predicted tie is wrong. HPA is `margin` 0, the margin form 0.5:
    strictly more, so neighbouring half-point levels are out. NaN where no pair counts.
    """
    mu, s = np.asarray(predicted, float), np.asarray(human, float)
    members: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        members.setdefault(prompt, []).append(index)
    right = total = 0
    for own in members.values():
        a, b = np.triu_indices(len(own), 1)
        gap_mu, gap_s = mu[own][a] - mu[own][b], s[own][a] - s[own][b]
        # Scores are halves or means of them: a difference of 0.5 must not become more than that by rounding.
        counts = np.abs(gap_s) > margin + 1e-9
        total += int(counts.sum())
        right += int((gap_mu * gap_s > 0)[counts].sum())
    return (right / total if total else float("nan")), total


def crps(probabilities: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Return the continuous ranked probability score E|X - y| - E|X - X'| / 2, in points; 0 is best. [N, 9], [N] -> [N]

    `observed` may lie between levels. For a distribution without spread it is the absolute error.
    """
    q, y = np.asarray(probabilities, float), np.asarray(observed, float)
    apart = np.abs(LEVELS[:, None] - LEVELS[None, :])
    own = np.einsum("nj,jk,nk->n", q, apart, q)
    return np.asarray((q * np.abs(LEVELS - y[:, None])).sum(axis=1) - own / 2)


@dataclass(frozen=True)
class Calibration:
    """Images in bins of equal count by expected score: mean expected and mean observed score of each, and how many.

    `error`: mean |expected - observed| over bins, weighted by their counts, in points. The spreads are the roots of the mean
    predicted variance and of the mean squared error around the predicted mean: equal if distributions are as wide as they
    should be.
    """

    expected: list[float]
    observed: list[float]
    counts: list[int]
    error: float
    spread_expected: float
    spread_observed: float


def calibration(probabilities: np.ndarray, observed: np.ndarray, bins: int = 8) -> Calibration:
    """Measure the calibration of `probabilities` [N, 9] on single ratings `observed` [N]. ValueError for none."""
    q, y = np.asarray(probabilities, float), np.asarray(observed, float)
    if not len(y):
        raise ValueError("calibration of no ratings")
    mu = q @ LEVELS
    parts = [part for part in np.array_split(np.argsort(mu, kind="stable"), min(bins, len(mu))) if len(part)]
    expected = [float(mu[p].mean()) for p in parts]
    seen = [float(y[p].mean()) for p in parts]
    counts = [len(p) for p in parts]
    variance = q @ LEVELS**2 - mu**2
    return Calibration(
        expected,
        seen,
        counts,
        float(np.average(np.abs(np.subtract(expected, seen)), weights=counts)),
        float(np.sqrt(max(0.0, variance.mean()))),
        float(np.sqrt(np.mean((y - mu) ** 2))),
    )
