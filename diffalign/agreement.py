"""How often two judges choose the same of two images: accuracy with an interval over prompts, and Kendall's tau-b."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diffalign.intervals import Interval, share_interval


@dataclass(frozen=True)
class Agreement:
    """How far a reward, or another person, agrees with people.

    pairs: those with a human preference and an answer of the other. human_ties, predicted_ties: pairs in which neither was
    preferred. accuracy: share of correct ones, a predicted tie counts half; interval: its 95% interval over groups. kendall:
    tau-b, in which ties of either side reduce the denominator.
    """

    pairs: int
    human_ties: int
    predicted_ties: int
    accuracy: float
    interval: Interval
    kendall: float


def agreement(
    human: np.ndarray,
    predicted: np.ndarray,
    groups: Sequence[str],
    unit: str = "prompts",
    seed: int = 0,
    resamples: int = 10_000,
) -> Agreement:
    """Return the agreement of two judges on pairs.

    human, predicted: signs [N]: 1 where the first image is preferred, -1 where the second is, 0 for neither. groups: what is
    resampled together, N names.
    """
    decided = human != 0
    if not decided.any():
        nothing = Interval(0, None, None, unit)
        return Agreement(0, int((~decided).sum()), int((predicted == 0).sum()), math.nan, nothing, math.nan)
    right = np.where(predicted == 0, 0.5, human == predicted)[decided]
    untied = decided & (predicted != 0)
    concordant = float((human * predicted)[untied].sum())
    denominator = math.sqrt(float(decided.sum()) * float((predicted != 0).sum()))
    kept = [group for group, counts in zip(groups, decided, strict=True) if counts]
    return Agreement(
        int(decided.sum()),
        int((~decided).sum()),
        int((predicted == 0).sum()),
        float(right.mean()),
        share_interval(right, kept, seed=seed, resamples=resamples, unit=unit),
        concordant / denominator if denominator else math.nan,
    )
