"""Compare two models' scores in pairs, with bootstrap intervals over prompts.

Prompts are resampled, not images, since images of one prompt are not independent. Seeds of a prompt (and runs, if
several are pooled) are averaged first. Fewer than 8 prompts give no interval (`diffalign.intervals`).
"""

from dataclasses import asdict, dataclass

import numpy as np

from diffalign.errors import DiffalignError
from diffalign.intervals import Interval, bootstrap, interval_in


@dataclass(frozen=True)
class Comparison:
    """Means over prompts; [low, high] is the 95% interval of `difference`; in `win_rate` a tie counts half.

    The ends of both intervals are None where there are too few prompts.
    """

    prompts: int
    base: float
    tuned: float
    difference: float
    low: float | None
    high: float | None
    win_rate: float
    win_low: float | None
    win_high: float | None

    def as_dict(self) -> dict[str, float | None]:
        """Return the fields as they stand in eval.json."""
        return asdict(self)

    @property
    def interval(self) -> Interval:
        """The interval of the difference."""
        return interval_in(self.as_dict())

    @property
    def win_interval(self) -> Interval:
        """The interval of the win rate."""
        return interval_in(self.as_dict(), "win_")


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
    change, win = bootstrap(np.stack([t - b, wins], axis=1), seed=seed, resamples=resamples)
    return Comparison(
        prompts=len(b),
        base=float(b.mean()),
        tuned=float(t.mean()),
        difference=float((t - b).mean()),
        low=change.low,
        high=change.high,
        win_rate=float(wins.mean()),
        win_low=win.low,
        win_high=win.high,
    )


def pool(runs: list[np.ndarray]) -> np.ndarray:
    """Join scores of several runs on the same prompts: [P, S] each to [P, sum of S]."""
    return np.concatenate(runs, axis=1)
