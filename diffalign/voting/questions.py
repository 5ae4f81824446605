"""What can be asked: groups of images of one prompt, and the protocol of what chooses the next question."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from typing import Protocol, TypeAlias

from diffalign.draws import draw
from diffalign.voting.log import Vote

Key: TypeAlias = tuple[int, frozenset[int]]
"""What a question asks: the number of a group, and places of images in it."""


@dataclass(frozen=True)
class Group:
    """Images of one prompt.

    images, models: name and generator of each. pairs: the places of the two images of each pair that may be asked; None:
    any two.
    """

    prompt: str
    images: tuple[str, ...]
    models: tuple[str, ...]
    pairs: tuple[tuple[int, int], ...] | None = None

    def count(self, size: int) -> int:
        """Return how many questions of `size` images there are: all pairs, or so many that each image is asked once."""
        if size == 2:
            return len(self.images) * (len(self.images) - 1) // 2 if self.pairs is None else len(self.pairs)
        return max(1, len(self.images) // size)

    def choices(self) -> Iterable[tuple[int, int]]:
        """Return the pairs that may be asked."""
        return combinations(range(len(self.images)), 2) if self.pairs is None else self.pairs


@dataclass(frozen=True)
class Question:
    """Images to ask about, in no particular order.

    group: its number. places: of the images in it. asked_by: the sampler's name. repeat_of: the id of the rater's vote
    that this one repeats.
    """

    group: int
    places: tuple[int, ...]
    asked_by: str
    repeat_of: str | None = None

    @property
    def key(self) -> Key:
        """What is asked, whatever the order."""
        return self.group, frozenset(self.places)


@dataclass
class State:
    """What a sampler knows of one rater's session.

    groups: all of them. size: images of a question, 2 for pairs. votes: this rater's that count, oldest first. waiting:
    questions that are shown or preloaded, and not answered. everybody: the votes of all raters that count. seed: of the
    draws. asked, per_group, per_image and per_models count this rater's votes and waiting questions: by what they ask, by
    group, by image (group, place), and by the set of models in them. done: questions of `size` images by group, each
    counted once however often it was asked.
    """

    groups: Sequence[Group]
    size: int
    rater: str
    seed: int = 0
    votes: list[Vote] = field(default_factory=list)
    waiting: list[Question] = field(default_factory=list)
    everybody: Sequence[Vote] = ()
    asked: Counter[Key] = field(default_factory=Counter)
    per_group: Counter[int] = field(default_factory=Counter)
    per_image: Counter[tuple[int, int]] = field(default_factory=Counter)
    per_models: Counter[frozenset[str]] = field(default_factory=Counter)
    done: Counter[int] = field(default_factory=Counter)

    @property
    def turn(self) -> int:
        """The number of the next question."""
        return len(self.votes) + len(self.waiting)

    def count(self, key: Key) -> None:
        """Count a question as asked."""
        group, places = key
        known = self.groups[group]
        if not self.asked[key] and len(places) == min(self.size, len(known.images)):
            self.done[group] += 1
        self.asked[key] += 1
        self.per_group[group] += 1
        self.per_models[frozenset(known.models[place] for place in places)] += 1
        for place in places:
            self.per_image[group, place] += 1

    def open_groups(self) -> list[int]:
        """Return the numbers of the groups with a question that was not asked."""
        return [i for i, group in enumerate(self.groups) if self.done[i] < group.count(self.size)]

    @cached_property
    def places(self) -> dict[str, tuple[int, int]]:
        """Name of an image -> number of its group and its place there."""
        return {name: (g, place) for g, group in enumerate(self.groups) for place, name in enumerate(group.images)}

    def key_of(self, vote: Vote) -> Key | None:
        """Return what a vote was asked; None if its images are not all in one of the groups."""
        found = [self.places.get(name) for name in vote.images]
        known = [place for place in found if place is not None]
        if len(known) < len(found) or len({group for group, _ in known}) != 1:
            return None
        return known[0][0], frozenset(place for _, place in known)


class Sampler(Protocol):
    """Chooses what to ask. `name` stands as `asked_by` in the log."""

    name: str

    def next_question(self, state: State) -> Question | None:
        """Return the next question, or None where nothing is left to ask. An equal state gives an equal question."""
        ...


def shown_order(question: Question, state: State) -> tuple[int, ...]:
    """Return the places of a question's images from left to right, by a draw keyed by the rater, the images and the turn."""
    group, places = state.groups[question.group], sorted(question.places)
    what = "\n".join([state.rater, *(group.images[place] for place in places)])
    order = draw(state.seed, "vote sides", step=state.turn, group=what).permutation(len(places))
    return tuple(places[i] for i in order)
