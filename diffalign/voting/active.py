"""Questions whose answer is least certain: images that a reward scores alike."""

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from diffalign.draws import draw
from diffalign.voting.questions import Group, Question, State

MOST_LISTED = 512
"""Pairs of a group that are compared; of a larger group each image is compared with its neighbours in score."""


class Candidate(NamedTuple):
    """A question of a group. gap: between the highest and the lowest score of its images. places: of its images."""

    gap: float
    places: frozenset[int]


class Active:
    """Asks the prompt that was asked least; of its questions the one whose images have the closest scores.

    By the Bradley-Terry model the win probability of a pair is 1 / (1 + exp(b - a)): closest to a half where scores are
    closest, so such an answer says most. scores: image's name -> score. Images without a finite score are asked last. The
    draws do not depend on the rater, as those of `Balanced`.
    """

    name = "active"

    def __init__(self, scores: Mapping[str, float]) -> None:
        self.scores = scores
        self._listed: dict[tuple[int, int], tuple[Group, list[Candidate]]] = {}

    def next_question(self, state: State) -> Question | None:
        """Return the next question, or None where each one was asked."""
        generator = draw(state.seed, "vote active", step=state.turn)
        left = state.open_groups()
        for asked in sorted({state.per_group[i] for i in left}):
            level = [(i, self._closest(i, state)) for i in left if state.per_group[i] == asked]
            found = [(i, closest) for i, closest in level if closest is not None]
            if found:
                least = min(closest.gap for _, closest in found)
                best = [one for one in found if one[1].gap == least]
                group, closest = best[int(generator.integers(len(best)))]
                return Question(group, tuple(sorted(closest.places)), self.name)
        return None

    def _closest(self, group: int, state: State) -> Candidate | None:
        """Return a group's closest question that was not asked; None where each was."""
        key, known = (group, state.size), state.groups[group]
        if key not in self._listed or self._listed[key][0] is not known:
            self._listed[key] = known, _by_gap(known, state.size, self.scores)
        return next((one for one in self._listed[key][1] if not state.asked[group, one.places]), None)


def _by_gap(group: Group, size: int, scores: Mapping[str, float]) -> list[Candidate]:
    """Return a group's questions, the closest first."""
    values = np.array([scores.get(name, math.nan) for name in group.images])
    order = np.argsort(values, kind="stable").tolist()  # images without a score last
    if size == 2 and (group.pairs is not None or group.count(2) <= MOST_LISTED):
        found = list(group.choices())
    elif size == 2:
        found = list(pairwise(order))
    else:
        count = min(size, len(order))
        found = [tuple(order[n : n + count]) for n in range(len(order) - count + 1)]

    def gap(places: tuple[int, ...]) -> float:
        known = values[list(places)]
        return float(np.ptp(known)) if np.isfinite(known).all() else math.inf

    return sorted((Candidate(gap(places), frozenset(places)) for places in found), key=lambda one: one.gap)
