"""Score one batch of a plan: read and decode its images, measure them, and say which ones cannot be scored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from PIL import Image

from diffalign.files.images import Unreadable, decode
from diffalign.rewards import Reward
from diffalign.rewards.base import Prepared
from diffalign.rewards.batches import measure_batch, reason_of
from diffalign.rewards.groupwise import GroupReward
from diffalign.scoring.items import digest
from diffalign.scoring.plan import Cell
from diffalign.scoring.store import Known, Result

PIXELS_AHEAD = 128_000_000
"""Pixels of the images that are read ahead, and of those scored at once: about 0.5 GB each. One image may be larger."""


@dataclass(frozen=True)
class Ahead:
    """An image that was read ahead: prepared for a reward, or unreadable, or `failed` in the reward's preparation."""

    sha256: str
    prepared: Prepared | None = None
    unreadable: str = ""
    failed: str = ""


@dataclass
class Found:
    """What was found with one reward.

    failed: the reward raised an error; not stored, so that the next run tries again. broken: reasons of images that
    cannot be decoded, by hash. images: how many were tried.
    """

    results: Known = field(default_factory=dict)
    failed: Known = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    images: int = 0

    def add(self, other: Found) -> None:
        """Add what another batch found."""
        self.results |= other.results
        self.failed |= other.failed
        self.broken |= other.broken
        self.images += other.images


def read_ahead(cells: Iterable[Cell], reward: Reward, pool: ThreadPoolExecutor, window: int) -> Iterator[Ahead]:
    """Yield what reading each cell gave, in order; at most `window` are in memory, and `PIXELS_AHEAD`."""
    pending: list[tuple[int, Future[Ahead]]] = []
    for cell in cells:
        while pending and (len(pending) > window or cell.pixels + sum(pixels for pixels, _ in pending) > PIXELS_AHEAD):
            yield pending.pop(0)[1].result()
        pending.append((cell.pixels, pool.submit(_read, cell, reward)))
    for _, future in pending:
        yield future.result()


def _read(cell: Cell, reward: Reward) -> Ahead:
    sha256 = ""
    try:
        data = cell.origin.read()
        sha256 = digest(data)
        image = decode(data)
    except Unreadable as error:
        return Ahead(sha256, unreadable=str(error))
    try:
        return Ahead(sha256, reward.prepare(image))
    except Exception as error:  # an image that this reward cannot take; another reward may
        return Ahead(sha256, failed=reason_of(error))


def score_batch(reward: Reward, read: Iterable[tuple[Cell, Ahead]], proven: bool) -> Iterator[Found]:
    """Yield what a reward finds in a batch, in one part unless its images are large together (`PIXELS_AHEAD`).

    proven: as `measure_batch` takes it. Raises what that raises.
    """
    found, ready = Found(), list[tuple[Cell, Prepared]]()
    whole = isinstance(reward, GroupReward)
    for cell, ahead in read:
        found.images += 1
        if ahead.unreadable:
            found.broken[cell.sha256] = ahead.unreadable
        elif ahead.sha256 != cell.sha256:
            found.broken[cell.sha256] = "changed while it was being scored"
        elif ahead.prepared is None:
            found.failed[cell.key] = Result({}, ahead.failed)
        else:
            ready.append((cell, ahead.prepared))
        # A judge of groups sees the images of a prompt together.
        if not whole and sum(_pixels(prepared) for _, prepared in ready) > PIXELS_AHEAD:
            _measure(reward, ready, proven, found)
            yield found
            proven, found, ready = proven or bool(found.results), Found(), []
    if ready:
        _measure(reward, ready, proven, found)
    yield found


def _pixels(prepared: Prepared) -> int:
    """Return the pixels of a prepared image, or the values of a prepared tensor."""
    return prepared.width * prepared.height if isinstance(prepared, Image.Image) else prepared.numel()


def _measure(reward: Reward, ready: list[tuple[Cell, Prepared]], proven: bool, found: Found) -> None:
    """Add the scores of images by key, and apart from them the images on which the reward failed."""
    prompts, facts = [cell.prompt for cell, _ in ready], [cell.facts for cell, _ in ready]
    measured = measure_batch(reward, [prepared for _, prepared in ready], prompts, facts, proven)
    for (cell, _), one in zip(ready, measured, strict=True):
        place = found.results if one.error is None else found.failed
        place[cell.key] = Result(_named(reward, one.values), one.reason)


def _named(reward: Reward, values: dict[str, float]) -> dict[str, float]:
    """Return values by the names they have in a row: "" for the score, the others by column."""
    return {("" if k == 0 else name): values[name] for k, name in enumerate(reward.columns)}
