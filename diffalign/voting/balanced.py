"""The default order of questions: random, and balanced over prompts, models and images."""

from itertools import islice

import numpy as np

from diffalign.draws import draw
from diffalign.voting.questions import Question, State

MOST_LOOKED_AT = 512
"""Pairs of a group among which the least asked is chosen; of a group with more, this many are drawn."""


class Balanced:
    """Asks the prompt that was asked least; of its pairs first those of two models, and the least asked of these.

    Of equals a pair that joins a new image to one that was asked comes first: votes on images that no chain of questions
    connects cannot be ranked together, and half of them would be left out (`shares.won_shares`). In a group with more pairs
    than are looked at, the least asked images come first.

    The draws do not depend on the rater: people who vote on the same images are asked the same questions, so that their
    agreement can be measured. Sides differ between them.
    """

    name = "balanced"

    def next_question(self, state: State) -> Question | None:
        """Return the next question, or None where each one was asked."""
        generator = draw(state.seed, "vote question", step=state.turn)
        left = state.open_groups()
        while left:
            least = min(state.per_group[i] for i in left)
            group = int(generator.choice([i for i in left if state.per_group[i] == least]))
            places = _pair(group, state, generator) if state.size == 2 else _several(group, state, generator)
            if places is not None:
                return Question(group, places, self.name)
            left.remove(group)
        return None


def _pair(group: int, state: State, generator: np.random.Generator) -> tuple[int, ...] | None:
    """Return the places of the least asked pair; None where each was asked."""
    known = state.groups[group]
    small = known.count(2) <= MOST_LOOKED_AT
    if small:
        found = list(known.choices())
    elif known.pairs is not None:
        found = [known.pairs[i] for i in generator.integers(0, len(known.pairs), MOST_LOOKED_AT)]
    else:
        drawn = generator.integers(0, len(known.images), (4 * MOST_LOOKED_AT, 2))
        found = [
            (int(min(a, b)), int(max(a, b))) for a, b in islice((d for d in drawn if d[0] != d[1]), MOST_LOOKED_AT)
        ]
    new = [pair for pair in found if not state.asked[group, frozenset(pair)]]
    if not new:
        return None

    begun = small and any(state.per_image[group, place] for place in range(len(known.images)))

    def order(pair: tuple[int, int]) -> tuple[bool, int, bool, int]:
        models = frozenset(known.models[place] for place in pair)
        asked = [state.per_image[group, place] for place in pair]
        apart = begun and all(asked) == any(asked)
        return len(models) < 2, state.per_models[models], apart, sum(asked)

    first = min(map(order, new))
    best = [pair for pair in new if order(pair) == first]
    return best[int(generator.integers(len(best)))]


def _several(group: int, state: State, generator: np.random.Generator) -> tuple[int, ...] | None:
    """Return the places of the images that were asked least; None where each set of them was asked."""
    shuffled = generator.permutation(len(state.groups[group].images))
    least = sorted(shuffled.tolist(), key=lambda place: state.per_image[group, place])[: state.size]
    return None if state.asked[group, frozenset(least)] else tuple(sorted(least))
