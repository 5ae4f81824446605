"""Combine several rewards into one number an image: pure functions of numpy arrays.

Scores are [R rewards, K images of one prompt], NaN where a reward could not score. No function mixes prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diffalign.errors import DiffalignError


def vote_shares(scores: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Return the share of won comparisons of each image, [K] in [0, 1], from scores [R rewards, K images].

    Syn-Pic: RankDPO, arXiv 2410.18013, section 3.2. Every reward compares every pair; only a strictly higher score
    wins, so a tie gives neither a vote. A pair with a NaN casts no vote and is not counted in the denominator; an image
    that was never compared gets NaN, since absent is not lowest. No reward is rescaled: any increasing transform of any
    reward leaves the shares unchanged. weights: [R], how many votes each reward has; with 0 it has no say.
    """
    a, b = scores[:, :, None], scores[:, None, :]
    known = np.isfinite(a) & np.isfinite(b) & ~np.eye(scores.shape[1], dtype=bool)
    won = (a > b) & known
    if weights is None:
        weights = np.ones(len(scores))
    wins, compared = (np.einsum("r,rij->i", weights, x.astype(np.float64)) for x in (won, known))
    return np.where(compared > 0, wins / np.where(compared > 0, compared, 1.0), np.nan)


@dataclass(frozen=True)
class Calibration:
    """Centre and spread of a reward over a whole dataset, stored with whatever was made with them.

    Raw scores of different rewards differ by orders of magnitude (HPSv2 near 0.28, PickScore near 21). These constants
    put them on one scale that does not depend on the group, so the strength of a preference is kept.
    """

    mean: float
    std: float

    @classmethod
    def of(cls, scores: np.ndarray) -> "Calibration":
        """Return population mean and standard deviation of all finite scores. Raises DiffalignError without spread."""
        known = np.asarray(scores, dtype=np.float64)
        known = known[np.isfinite(known)]
        if len(known) < 2 or not known.std() > 0:
            raise DiffalignError(f"{len(known)} scores without any spread cannot calibrate a reward; score more images")
        return cls(float(known.mean()), float(known.std()))

    def apply(self, scores: np.ndarray) -> np.ndarray:
        """Return (scores - mean) / std."""
        return (np.asarray(scores, dtype=np.float64) - self.mean) / self.std


def weighted_sum(scores: np.ndarray, weights: Sequence[float], calibrations: Sequence[Calibration]) -> np.ndarray:
    """Return sum_r w_r (s_r - mean_r) / std_r, [K]; NaN if a reward with a weight above 0 could not score the image."""
    w = _weights(scores, weights)
    if len(calibrations) != len(scores):
        raise DiffalignError(f"{len(scores)} rewards and {len(calibrations)} calibrations; each reward needs its own")
    used = w != 0  # 0 times NaN would be NaN
    scaled = np.stack([c.apply(s) for c, s in zip(calibrations, scores, strict=True)])
    return np.asarray((w[used, None] * scaled[used]).sum(axis=0))


def dvao(scores: np.ndarray, weights: Sequence[float] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return (advantages [K], effective weights [R]) of one group by DVAO (arXiv 2605.25604).

    A = sum_k w~_k (r_k - mean r_k) / sigma_k with w~_k = w_k sigma_k / sum_l w_l sigma_l and the population standard
    deviation (a std, despite the method's name). This equals the centred weighted sum of raw rewards over sum_l w_l
    sigma_l, so it ranks a group as a plain sum of raw rewards does: put rewards on one scale first, and expect no
    effect on losses that use only the order. A group without any spread gets zeros. A NaN in a reward with a weight above
    0 is a NaN in the advantage.
    """
    w = _weights(scores, weights if weights is not None else [1.0] * len(scores))
    spread = w * np.array([row[np.isfinite(row)].std() if np.isfinite(row).any() else 0.0 for row in scores])
    total = spread.sum()
    used = w != 0
    if not total > 0:
        return np.where(np.isfinite(scores[used]).all(axis=0), 0.0, np.nan), np.zeros(len(scores))
    combined = (w[used, None] * scores[used]).sum(axis=0)
    return (combined - np.nanmean(combined)) / total, spread / total


def gated(preferences: np.ndarray, passed: np.ndarray) -> np.ndarray:
    """Return a score [K] whose order puts constraints first and preferences among those that pass equally many.

    preferences: [K], higher is better. passed: bool [C constraints, K]. An image that passes more constraints comes
    first, whatever its preference; among equals the preference decides. The score is the number of passed constraints
    plus the preference's rank in [0, 1) (ties share their rank), so no scale has to be chosen. NaN stays NaN, and takes
    no place in the ranks.
    """
    preferences = np.asarray(preferences, dtype=np.float64)
    known = np.isfinite(preferences)
    below = (preferences[None, :] < preferences[:, None]) & known[None, :]
    rank = below.sum(axis=1) / max(1, len(preferences))
    return np.where(known, np.asarray(passed, dtype=bool).sum(axis=0) + rank, np.nan)


def corrected_score(task: np.ndarray, quality: np.ndarray, centre: float = 3.0, offset: float = 0.2) -> np.ndarray:
    """Return GDRO's corrected score r (u - centre) + offset (arXiv 2601.02036, section 5), elementwise, NaN where either is.

    task: r, OCR or GenEval scores. quality: u, the mean of UnifiedReward 2.0's alignment, coherence and style, each 1 to 5 and
    mostly 3 to 4. The paper has centre 3 and adds 0.2 for its plots only. It does not say whether a table averages before or
    after: mean(r (u - 3)) is not mean(r) (mean(u) - 3), so say which one you print.
    """
    return np.asarray(task) * (np.asarray(quality) - centre) + offset


def _weights(scores: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    w = np.asarray(weights, dtype=np.float64)
    if scores.ndim != 2 or w.shape != (len(scores),):
        raise DiffalignError(f"scores of shape {scores.shape} and {len(w)} weights: one weight a reward is needed")
    if not np.isfinite(w).all() or (w < 0).any():
        raise DiffalignError(
            f"weights {w.tolist()} must be finite and not negative; rewards are higher-is-better already"
        )
    return w
