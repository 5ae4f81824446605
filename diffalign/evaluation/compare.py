"""Compare two models' scores in pairs, with bootstrap intervals over prompts.

Prompts are resampled, not images, since images of one prompt are not independent. Seeds of a prompt (and runs, if
several are pooled) are averaged first.
"""

from dataclasses import asdict, dataclass

import numpy as np

from diffalign.errors import DiffalignError


@dataclass(frozen=True)
class Comparison:
    """Means over prompts; [low, high] is the 95% interval of `difference`; in `win_rate` a tie counts half."""

    prompts: int
    base: float
    tuned: float
    difference: float
    low: float
    high: float
    win_rate: float
    win_low: float
    win_high: float

    def as_dict(self) -> dict[str, float]:
        """Return the fields as they stand in eval.json."""
        return asdict(self)


def compare(base: np.ndarray, tuned: np.ndarray, seed: int = 0, resamples: int = 10_000) -> Comparison:
    """Compare scores [P prompts, S seeds] of two models; an image that either could not score is left out of both.

    Raises DiffalignError if the shapes differ, or if no prompt has a score from both.
    """
    base, tuned = np.asarray(base, dtype=np.float64), np.asarray(tuned, dtype=np.float64)
    if base.shape != tuned.shape or base.ndim != 2:
        raise DiffalignError(
            f"scores of shapes {base.shape} and {tuned.shape} cannot be paired; both must be [prompts, seeds]"
        )
    known = np.isfinite(base) & np.isfinite(tuned)
    kept = known.any(axis=1)
    if not kept.any():
        raise DiffalignError("no image was scored for both models; the scores' reasons say why")
    weight = known[kept] / known[kept].sum(axis=1, keepdims=True)
    b = (np.nan_to_num(base[kept]) * weight).sum(1)
    t = (np.nan_to_num(tuned[kept]) * weight).sum(1)
    wins = ((0.5 * (np.sign(np.nan_to_num(tuned[kept]) - np.nan_to_num(base[kept])) + 1)) * weight).sum(1)
    means = _resampled(np.stack([t - b, wins], axis=1), seed, resamples)
    (low, win_low), (high, win_high) = np.quantile(means, [0.025, 0.975], axis=0)
    return Comparison(
        len(b), *(float(v) for v in (b.mean(), t.mean(), (t - b).mean(), low, high, wins.mean(), win_low, win_high))
    )


def _resampled(values: np.ndarray, seed: int, resamples: int, chunk: int = 500) -> np.ndarray:
    """Return means over resampled rows, [resamples, columns], computed in chunks to save memory."""
    rng = np.random.default_rng(seed)
    means = []
    for start in range(0, resamples, chunk):
        rows = rng.integers(len(values), size=(min(chunk, resamples - start), len(values)))
        means.append(values[rows].mean(axis=1))
    return np.concatenate(means)


def pool(runs: list[np.ndarray]) -> np.ndarray:
    """Join scores of several runs on the same prompts: [P, S] each to [P, sum of S]."""
    return np.concatenate(runs, axis=1)
