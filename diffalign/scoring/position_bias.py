"""Measure whether a judge of several images prefers those that it is shown first, or last."""

from collections.abc import Mapping

import numpy as np

from diffalign.intervals import bootstrap
from diffalign.rewards import Reward
from diffalign.rewards.groupwise import GroupReward
from diffalign.scoring.run import Scores


def position_bias(scores: Scores, rewards: Mapping[str, Reward]) -> list[str]:
    """Return a line for each groupwise reward: the correlation of score and place within prompts, with its interval.

    The interval is bootstrapped over prompts; a direction is named only where it excludes 0.
    """
    lines = []
    for label, reward in rewards.items():
        if isinstance(reward, GroupReward):
            sums = _sums_by_prompt(scores, label, reward.passes)
            lines.append(f"{label}: {_bias(sums)}")
    return lines


def _sums_by_prompt(scores: Scores, label: str, passes: int) -> np.ndarray:
    """Return (sum of score x place, of place^2, of score^2) of each prompt, [prompts, 3], centred within it."""
    seen: dict[str, list[tuple[float, float]]] = {}
    for item, row in zip(scores.items, scores.rows, strict=True):
        for n in range(1, passes + 1):
            seen.setdefault(item.prompt or "", []).append((row[f"{label}.score@{n}"], row[f"{label}.place@{n}"]))
    sums = []
    for pairs in seen.values():
        held = np.array([pair for pair in pairs if np.isfinite(pair).all()], dtype=np.float64).reshape(-1, 2)
        if len(held) > 1:
            score, place = (held - held.mean(axis=0)).T
            sums.append(((score * place).sum(), (place**2).sum(), (score**2).sum()))
    return np.array(sums, dtype=np.float64).reshape(-1, 3)


def _bias(sums: np.ndarray) -> str:
    def correlation(means: np.ndarray) -> np.ndarray:
        product = np.sqrt(means[:, 1] * means[:, 2])
        return np.divide(means[:, 0], product, out=np.zeros(len(means)), where=product > 0)[:, None]

    if not len(sums):
        return "position bias: nothing to compute it from"
    value = float(correlation(sums.mean(axis=0, keepdims=True))[0, 0])
    (interval,) = bootstrap(sums, correlation)
    said = {1: "images shown later score higher", -1: "images shown later score lower", 0: "none seen"}[interval.side()]
    said = said if interval.low is not None else "too few prompts to tell"
    ends = f"; 95%: {interval.words('+.2f')}" if interval.low is not None else ""
    return f"position bias {value:+.2f} (correlation of score and place, {len(sums)} prompts{ends}): {said}"
