"""Test whether the place of an image on the screen explains answers: sides are drawn, so no place should be favoured."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest, chisquare

from diffalign.intervals import exact_interval
from diffalign.voting.log import Vote

ALARM = 0.01
"""The chance of a warning where no place is favoured, for each test."""
FEWEST = 20
"""Choices below which nothing is tested."""


@dataclass(frozen=True)
class SideTest:
    """One person's choices by place.

    shown: images of a question. chosen: how often each place, left to right, was the best alone. share: of the left one of
    two, low and high its 95% interval (Clopper and Pearson 1934); None with more places. p: of the exact binomial test of a
    half, or Pearson's chi-square test of equal counts.
    """

    rater: str
    shown: int
    chosen: tuple[int, ...]
    p: float
    share: float | None = None
    low: float | None = None
    high: float | None = None

    @property
    def explains(self) -> bool:
        """Whether the place explains votes."""
        return self.p < ALARM

    @property
    def words(self) -> str:
        """The finding in one sentence."""
        if self.share is not None and self.low is not None and self.high is not None:
            side = "left" if self.share > 0.5 else "right"
            share, low, high = (
                (self.share, self.low, self.high) if side == "left" else (1 - self.share, 1 - self.high, 1 - self.low)
            )
            return (
                f"{self.rater} chose the {side} image in {share:.0%} of {sum(self.chosen)} choices "
                f"({low:.0%} to {high:.0%}); sides are drawn at random, so it should be 50%"
            )
        most = int(np.argmax(self.chosen))
        return (
            f"{self.rater} chose place {most + 1} of {self.shown} in {self.chosen[most] / sum(self.chosen):.0%} of "
            f"{sum(self.chosen)} choices; places are drawn at random, so it should be {1 / self.shown:.0%}"
        )


def side_tests(votes: Sequence[Vote]) -> list[SideTest]:
    """Return a test for each rater and number of images with at least 20 choices of a single best image."""
    counts: dict[tuple[str, int], list[int]] = {}
    for vote in votes:
        ranks = vote.ranks
        best = [place for place, rank in enumerate(ranks) if rank == min(ranks)]
        if len(best) == 1:
            counts.setdefault((vote.rater, len(ranks)), [0] * len(ranks))[best[0]] += 1
    found = []
    for (rater, shown), chosen in sorted(counts.items()):
        if sum(chosen) < FEWEST:
            continue
        if shown == 2:
            p = float(binomtest(chosen[0], sum(chosen), 0.5).pvalue)
            ends = exact_interval(chosen[0], sum(chosen), "choices")
            share = chosen[0] / sum(chosen)
            found.append(SideTest(rater, shown, tuple(chosen), p, share, ends.low, ends.high))
        else:
            found.append(SideTest(rater, shown, tuple(chosen), float(chisquare(chosen).pvalue)))
    return found
