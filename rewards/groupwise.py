"""Base class of judges that see several images of one prompt at once, and rate each beside the others.

A score then depends on the other images of its group. `diffalign score` forms the groups: images of one prompt, at most
`largest` together, and keeps a score only as long as its group stays the same.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from PIL import Image
from torch import Tensor

from diffalign.draws import draw
from diffalign.rewards.base import Metadata, Prepared, Reward, by_column
from diffalign.rewards.chat_api import NoAnswer
from diffalign.rewards.vlm import pictures

NAN = float("nan")
GROUP, MEMBER = "group", "member"
"""Keys of the metadata by which `diffalign score` says which images belong together, and which of them this one is."""
ALONE = "no other image of its prompt to compare it with"


@dataclass(frozen=True)
class ImageGroup:
    """Images of one prompt. name: equal for equal images and prompts, for draws."""

    prompt: str
    images: tuple[Image.Image, ...]
    name: str

    def order(self, number: int) -> list[int]:
        """Return the order in which pass `number` shows the images: shuffled, and every second one the reverse of the
        one before, so that a bias that grows with the place cancels.
        """
        found = draw(0, "group_judge", group=self.name, step=number // 2).permutation(len(self.images)).tolist()
        return [int(i) for i in (found[::-1] if number % 2 else found)]


@dataclass(frozen=True)
class Rated:
    """What became of an image of a group. passes: (score, place) of each pass; a place is from 0 (first) to 1 (last)."""

    score: float
    passes: tuple[tuple[float, float], ...]
    disagreement: float = NAN
    reason: str = ""


def pass_columns(count: int) -> tuple[str, ...]:
    """Return the columns of `count` passes; no summary shows them, but the position bias is computed from them."""
    return tuple(name for n in range(1, count + 1) for name in (f"score@{n}", f"place@{n}"))


class GroupReward(Reward):
    """A reward of images beside others of their prompt. largest: the most images that are shown together."""

    groupwise: ClassVar[bool] = True
    reads = ("prompt", "metadata")
    largest: int
    passes: int

    _held: dict[tuple[str, ...], dict[str, Rated]]
    _failed: dict[tuple[str, ...], NoAnswer]

    @abstractmethod
    def rate(self, groups: Sequence[ImageGroup]) -> list[list[Rated] | NoAnswer]:
        """Return, for each group of at least two images, how each image was rated, or why the group got no answer."""

    def measure(
        self, images: list[Image.Image], prompts: list[str], metadata: list[Metadata] | None = None
    ) -> dict[str, Tensor]:
        return self.measure_prepared(images, prompts, metadata)

    def measure_prepared(
        self, items: Sequence[Prepared], prompts: list[str], metadata: list[Metadata] | None = None
    ) -> dict[str, Tensor]:
        """Return the columns of images that stand beside those of their prompt in this batch.

        Raises NoAnswer if a group got no answer; those that did are kept for a call with single images of theirs.
        """
        images = pictures(items)
        facts = metadata or [{} for _ in images]
        groups: dict[tuple[str, ...], dict[str, int]] = {}
        for n, (prompt, fact) in enumerate(zip(prompts, facts, strict=True)):
            key = (prompt, *fact.get(GROUP, ()))
            groups.setdefault(key, {})[str(fact.get(MEMBER, n))] = n
        whole = {key: g for key, g in groups.items() if len(g) > 1}
        for key in whole:
            self._held.pop(key, None)
            self._failed.pop(key, None)
        asked = [ImageGroup(k[0], tuple(images[n] for n in g.values()), repr((k[0], *g))) for k, g in whole.items()]
        for (key, group), found in zip(whole.items(), self.rate(asked), strict=True):
            if isinstance(found, NoAnswer):
                self._failed[key] = found
            else:
                self._held[key] = dict(zip(group, found, strict=True))
        if failed := [self._failed[key] for key in groups if key in self._failed]:
            raise failed[0]
        alone = Rated(NAN, ((NAN, NAN),) * self.passes, reason=ALONE)
        rated = {n: self._held.get(key, {}).get(m, alone) for key, g in groups.items() for m, n in g.items()}
        self.reasons = [rated[n].reason for n in range(len(images))]
        return by_column(self.columns, [self.row(rated[n]) for n in range(len(images))])

    def row(self, rated: Rated) -> tuple[float, ...]:
        """Return the values of the columns."""
        return (rated.score, *(v for one in rated.passes for v in one))
