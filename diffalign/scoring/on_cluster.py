"""Score the batches of a plan on a cluster: actors hold the reward, and this process reads the images and keeps the scores."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from diffalign.cluster import Engine, check_same
from diffalign.data.containers import AddressOrigin, BytesOrigin, RefusedOrigin
from diffalign.files.images import Unreadable
from diffalign.rewards import Reward
from diffalign.scoring.batches import Found, read_ahead, score_batch
from diffalign.scoring.items import Item, scan
from diffalign.scoring.plan import Batch, Cell

READERS = 16
"""Threads that read from addresses in an actor."""
SCANNED = 256
"""Images that an actor reads at once to hash them."""


@dataclass(frozen=True)
class OpenWorker:
    """Builds the worker of an actor. identity: of the reward, as the driver knows it; threads: that decode."""

    label: str
    open_reward: Callable[[], Reward]
    identity: dict[str, Any]
    threads: int

    def __call__(self) -> "ScoreWorker":
        return ScoreWorker(self)


class ScoreWorker:
    """A reward in an actor."""

    def __init__(self, opened: OpenWorker) -> None:
        self.reward = opened.open_reward()
        check_same(f"reward {opened.label}", opened.identity, self.reward.identity())
        self.pool = ThreadPoolExecutor(opened.threads)
        self.proven = False

    def __call__(self, batch: Batch, proven: bool) -> Found:
        found = Found()
        read = read_ahead(batch.cells, self.reward, self.pool, len(batch.cells))
        for part in score_batch(self.reward, zip(batch.cells, read, strict=True), proven or self.proven):
            found.add(part)
        self.proven = self.proven or bool(found.results)
        return found


class Scanner:
    """Reads images at addresses in an actor, for their hashes and sizes."""

    def __call__(self, items: list[Item], proven: bool) -> list[tuple[str, int, str]]:
        with ThreadPoolExecutor(READERS) as pool:
            return list(pool.map(scan, items))


@dataclass(frozen=True)
class OnCluster:
    """Where batches are scored if not here. openers: label -> what builds the reward in an actor."""

    engine: Engine
    openers: Mapping[str, Callable[[], Reward]]

    def parts(
        self, label: str, batches: list[Batch], identity: dict[str, Any], pool: ThreadPoolExecutor, threads: int
    ) -> Iterator[Found]:
        """Yield what is found in each batch, in the order in which they are done."""
        orders = ((batch.number, _with_bytes(batch, pool)) for batch in batches)
        opened = OpenWorker(label, self.openers[label], identity, threads)
        for _, found in self.engine.run(opened, orders, len(batches)):
            yield found

    def scan(self, items: dict[int, Item]) -> Iterator[tuple[int, tuple[str, int, str]]]:
        """Yield (number, hash, pixels and fault) of each item; the nodes read them."""
        numbers = list(items)
        chunks = [numbers[start : start + SCANNED] for start in range(0, len(numbers), SCANNED)]
        orders = ((n, [items[i] for i in chunk]) for n, chunk in enumerate(chunks))
        for n, answers in self.engine.without_gpu().run(Scanner, orders, len(chunks)):
            yield from zip(chunks[n], answers, strict=True)


def _with_bytes(batch: Batch, pool: ThreadPoolExecutor) -> Batch:
    """Return the batch with the bytes of images on a disk, since a node may not see the disk of the driver."""
    return replace(batch, cells=tuple(pool.map(_sent, batch.cells)))


def _sent(cell: Cell) -> Cell:
    if isinstance(cell.origin, AddressOrigin):
        return cell
    try:
        return replace(cell, origin=BytesOrigin(cell.origin.read()))
    except Unreadable as error:
        return replace(cell, origin=RefusedOrigin(str(error)))
