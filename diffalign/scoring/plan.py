"""Plan what one reward scores: a list of batches, each with its images and their keys.

The plan follows from the images, the reward and what is known already. The batch decides the last bits of its scores, so
any number of processes, and a cluster, that work on the same plan find the same bytes.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

from diffalign.data.containers import Origin
from diffalign.data.plan import chunks
from diffalign.rewards import Reward
from diffalign.rewards.groupwise import GROUP, GroupReward
from diffalign.scoring.items import Item
from diffalign.scoring.store import Known, key_of, with_facts


@dataclass(frozen=True)
class Cell:
    """One image to score. key: of its score in the store. pixels: how many it has. facts: the prompt's metadata."""

    key: str
    sha256: str
    pixels: int
    prompt: str
    facts: dict[str, Any]
    origin: Origin


@dataclass(frozen=True)
class Batch:
    """Images that a reward scores together."""

    number: int
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Plan:
    """The batches of one reward, and how many scores are known already."""

    batches: list[Batch]
    known: int

    @property
    def images(self) -> int:
        """How many images there are to score."""
        return sum(len(batch.cells) for batch in self.batches)


@dataclass
class Scanned:
    """What reading all images once gave: the hash of each image's bytes and its number of pixels.

    An unreadable image has a stand-in for the hash. broken: reasons, by hash, of images that cannot be read or decoded.
    """

    hashes: list[str]
    areas: list[int]
    broken: dict[str, str]


def not_scorable(reward: Reward, item: Item) -> str:
    """Return why a reward cannot score an item, "" if it can; no weights are needed for that."""
    reason = reward.reason_not_scorable(item.prompt, item.metadata)
    return f"{reason} ({item.fault})" if reason and item.fault and not item.prompt else reason


def make_plan(
    items: list[Item], scanned: Scanned, reward: Reward, identity: dict[str, Any], known: Known, batch_size: int
) -> Plan:
    """Return the batches of what is not known yet, in the order of the items.

    All images are cut into batches, known or not, so that those that a kill left over are the ones of an undisturbed run.
    What is left of batches that are known in part, as new images among old ones, makes batches at the end. Copies of an
    image with the same prompt share a key and are scored once.
    """
    wanted: dict[str, int] = {}
    for i, item in enumerate(items):
        if not not_scorable(reward, item):
            wanted.setdefault(key_of(scanned.hashes[i], item.prompt, with_facts(identity, item.metadata)), i)
    readable = [(key, i) for key, i in wanted.items() if scanned.hashes[i] not in scanned.broken]
    whole, rest = list[list[tuple[str, int]]](), list[tuple[str, int]]()
    parts = partial(group_chunks, items=items) if isinstance(reward, GroupReward) else chunks
    for chunk in parts(readable, batch_size):
        new = [(key, i) for key, i in chunk if key not in known]
        if len(new) == len(chunk):
            whole.append(new)
        else:
            rest += new
    batches = [
        Batch(number, tuple(_cell(key, items[i], scanned.hashes[i], scanned.areas[i]) for key, i in chunk))
        for number, chunk in enumerate([*whole, *parts(rest, batch_size)])
    ]
    return Plan(batches, sum(key in known for key in wanted))


def group_chunks(wanted: list[tuple[str, int]], size: int, items: list[Item]) -> list[list[tuple[str, int]]]:
    """Return parts of at least `size` (key, item) pairs, but for the last, in which the images of a group stay together."""
    groups: dict[tuple[str, ...], list[tuple[str, int]]] = {}
    for key, i in wanted:
        groups.setdefault((items[i].prompt or "", *items[i].metadata[GROUP]), []).append((key, i))
    parts: list[list[tuple[str, int]]] = []
    for group in groups.values():
        if parts and len(parts[-1]) < size:
            parts[-1] += group
        else:
            parts.append(list(group))
    return parts


def _cell(key: str, item: Item, sha256: str, pixels: int) -> Cell:
    prompt = item.prompt or ""
    return Cell(key, sha256, pixels, prompt, {**item.metadata, "prompt": prompt}, item.origin)
