"""Questions at random: every one that was not asked is as likely as any other."""

import numpy as np

from diffalign.draws import draw
from diffalign.voting.questions import Group, Question, State

TRIES = 200
"""Draws after which the questions that are left are listed."""


class Uniform:
    """Asks any question that was not asked, whatever its prompt and models.

    The draws do not depend on the rater, as those of `Balanced`.
    """

    name = "random"

    def next_question(self, state: State) -> Question | None:
        """Return the next question, or None where each one was asked."""
        generator = draw(state.seed, "vote random", step=state.turn)
        counts = np.array([group.count(state.size) for group in state.groups], dtype=np.float64)
        if not counts.sum():
            return None
        shares = counts / counts.sum()
        for _ in range(TRIES):
            group = int(generator.choice(len(shares), p=shares))
            places = _any(state.groups[group], state.size, generator)
            if not state.asked[group, frozenset(places)]:
                return Question(group, places, self.name)
        return _among_the_last(state, generator, self.name)


def _any(group: Group, size: int, generator: np.random.Generator) -> tuple[int, ...]:
    """Return the places of any question of a group."""
    if size == 2 and group.pairs is not None:
        return group.pairs[int(generator.integers(len(group.pairs)))]
    count = min(size, len(group.images))
    return tuple(sorted(int(place) for place in generator.permutation(len(group.images))[:count]))


def _among_the_last(state: State, generator: np.random.Generator, name: str) -> Question | None:
    """Return one of the questions that are left, where few are; None where there is none.

    Of groups from which more than two images are asked at once, each set of images is a question, so a group is done when
    `Group.count` of them were asked.
    """
    left = state.open_groups()
    for group in generator.permutation(left).tolist() if left else []:
        known = state.groups[group]
        if state.size == 2:
            new = [pair for pair in known.choices() if not state.asked[group, frozenset(pair)]]
        else:
            drawn = [_any(known, state.size, generator) for _ in range(TRIES)]
            new = [places for places in drawn if not state.asked[group, frozenset(places)]]
        if new:
            return Question(group, new[int(generator.integers(len(new)))], name)
    return None
