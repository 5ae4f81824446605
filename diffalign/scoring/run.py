"""The loop of `diffalign score`: hash, find what is not scored yet, decode ahead, score, store.

Rewards run one after another, so that only one model is in memory. A batch mixes prompts and image sizes. Reading,
decoding and the reward's own `prepare` run in threads, two batches ahead, while the model works on the current one.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from PIL import Image

from diffalign import stopping
from diffalign.files.images import Unreadable, area, decode
from diffalign.progress import OnNamedImages
from diffalign.rewards import Reward
from diffalign.rewards.base import Prepared
from diffalign.rewards.batches import measure_batch, reason_of
from diffalign.rewards.groupwise import GroupReward
from diffalign.scoring.groups import in_groups, with_groups
from diffalign.scoring.items import Item, digest
from diffalign.scoring.processes import Processes
from diffalign.scoring.store import IDENTITY, REASON, Result, Store, key_of, with_facts


@dataclass
class Scores:
    """The result of a run. rows: one an image, ready for the store. columns: the columns of each label, the score
    first.
    """

    rows: list[dict[str, Any]]
    columns: dict[str, tuple[str, ...]]
    computed: int = 0
    known: int = 0
    failed: int = 0
    items: list[Item] = field(default_factory=list)


Known = dict[str, Result]
"""Results by key."""


PIXELS_AHEAD = 128_000_000
"""Pixels of the images that are read ahead, and of a batch's: about 0.5 GB each. One image may be larger."""


@dataclass(frozen=True)
class Ahead:
    """An image that was read ahead: prepared for a reward, or unreadable, or `failed` in the reward's preparation."""

    sha256: str
    prepared: Prepared | None = None
    unreadable: str = ""
    failed: str = ""


@dataclass
class Found:
    """What one process found with one reward.

    broken: reasons of images that cannot be decoded, by hash. failed: the reward raised an error; not stored, so that
    the next run tries again.
    """

    results: Known = field(default_factory=dict)
    failed: Known = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)


def score_items(
    items: list[Item],
    rewards: dict[str, Reward],
    store: Store,
    *,
    batch_size: int = 32,
    workers: int = 4,
    processes: Processes | None = None,
    on_progress: OnNamedImages | None = None,
) -> Scores:
    """Score every item with every reward (label -> reward) that has not scored it yet; all processes get all rows.

    An image that cannot be read or decoded gets the reason and no score; so does one whose prompt a reward cannot use, and
    one on which a reward fails.
    """
    processes = processes or Processes()
    # Of all rewards first, so that missing weights are reported before an hour is spent on another reward. A reward that
    # can score none of the images is not asked: it needs no weights.
    usable = {label for label, r in rewards.items() if any(not _not_scorable(r, item) for item in items)}
    identities = {label: rewards[label].identity() for label in usable}
    with ThreadPoolExecutor(workers) as pool:
        hashes, areas, broken = _scan(items, pool, processes)
        computed = known = 0
        failures: dict[str, Known] = {label: {} for label in rewards}
        theirs = dict.fromkeys(rewards, items)  # a reward of groups sees each image's group as metadata
        for label, reward in rewards.items():
            if label not in usable:
                continue
            if isinstance(reward, GroupReward):
                theirs[label] = with_groups(items, hashes, broken, reward.largest)
            # This process scores its share of what nobody has scored yet.
            wanted = _wanted(theirs[label], hashes, reward, identities[label])
            todo = [(key, i) for key, i in wanted.items() if key not in store.known and hashes[i] not in broken]
            known += sum(key in store.known for key in wanted)
            if isinstance(reward, GroupReward):
                todo = [one for group in processes.share(in_groups(todo, theirs[label])) for one in group]
            else:
                todo = processes.share(todo)
            mine = _score(theirs[label], todo, hashes, areas, reward, store, batch_size, pool, label, on_progress)
            # All processes learn all results, so that each could write the rows.
            for found in processes.gather(mine):
                store.known |= found.results
                broken |= found.broken
                failures[label] |= found.failed
                computed += len(found.results)
            # The next reward may need all of the GPU's memory.
            reward.free()
            gc.collect()
    rows = [
        _row([theirs[label][i] for label in rewards], hashes[i], broken, rewards, identities, store.known, failures)
        for i in range(len(items))
    ]
    failed = sum(any(_reason_of(row, label) for label in rewards) for row in rows)
    return Scores(rows, {label: r.columns for label, r in rewards.items()}, computed, known, failed, items)


def _scan(
    items: list[Item], pool: ThreadPoolExecutor, processes: Processes
) -> tuple[list[str], list[int], dict[str, str]]:
    """Return the hash of every item's bytes and its number of pixels.

    Unreadable ones get a stand-in for the hash, and their reasons are returned by stand-in.
    """

    def one(item: Item) -> tuple[str, int, str]:
        try:
            data = item.origin.read()
            return digest(data), area(data), ""
        except Unreadable as error:
            return f"unread {item.name}", 0, str(error)

    hashes, areas, broken = [""] * len(items), [0] * len(items), {}
    mine = processes.share(list(range(len(items))))
    found = [(i, *answer) for i, answer in zip(mine, pool.map(one, (items[i] for i in mine)), strict=True)]
    for part in processes.gather(found):
        for i, sha256, pixels, reason in part:
            hashes[i], areas[i] = sha256, pixels
            if reason:
                broken[sha256] = reason
    return hashes, areas, broken


def _not_scorable(reward: Reward, item: Item) -> str:
    """Return why a reward cannot score an item, "" if it can; no weights are needed for that."""
    reason = reward.reason_not_scorable(item.prompt, item.metadata)
    return f"{reason} ({item.fault})" if reason and item.fault and not item.prompt else reason


def _wanted(items: list[Item], hashes: list[str], reward: Reward, identity: dict[str, Any]) -> dict[str, int]:
    """Return key -> an item with that key. Copies of an image with the same prompt share a key and are scored once."""
    wanted: dict[str, int] = {}
    for i, item in enumerate(items):
        if not _not_scorable(reward, item):
            wanted.setdefault(key_of(hashes[i], item.prompt, with_facts(identity, item.metadata)), i)
    return wanted


def _ahead(
    items: list[Item],
    todo: list[tuple[str, int]],
    areas: list[int],
    reward: Reward,
    pool: ThreadPoolExecutor,
    window: int,
) -> Iterator[tuple[str, int, Ahead]]:
    """Yield (key, item, what reading it gave) in order; at most `window` are in memory, and `PIXELS_AHEAD`."""

    def one(i: int) -> Ahead:
        sha256 = ""
        try:
            data = items[i].origin.read()
            sha256 = digest(data)
            image = decode(data)
        except Unreadable as error:
            return Ahead(sha256, unreadable=str(error))
        try:
            return Ahead(sha256, reward.prepare(image))
        except Exception as error:  # an image that this reward cannot take; another reward may
            return Ahead(sha256, failed=reason_of(error))

    pending: list[tuple[str, int, Future[Ahead]]] = []
    for key, i in todo:
        while pending and (
            len(pending) > window or areas[i] + sum(areas[other] for _, other, _ in pending) > PIXELS_AHEAD
        ):
            key_, i_, future = pending.pop(0)
            yield key_, i_, future.result()
        pending.append((key, i, pool.submit(one, i)))
    for key_, i_, future in pending:
        yield key_, i_, future.result()


def _score(
    items: list[Item],
    todo: list[tuple[str, int]],
    hashes: list[str],
    areas: list[int],
    reward: Reward,
    store: Store,
    batch_size: int,
    pool: ThreadPoolExecutor,
    label: str,
    on_progress: OnNamedImages | None,
) -> Found:
    """Score this process's share."""
    found = Found()
    batch: list[tuple[str, int, Prepared]] = []

    def flush() -> None:
        if batch:
            with stopping.deferred():
                fresh, failed = _measure(items, batch, reward, proven=bool(found.results))
                store.add(fresh)
            if store.path is not None:
                stopping.keep(f"{len(store.known)} scores are")
            stopping.check()
            found.results.update(fresh)
            found.failed.update(failed)
            batch.clear()

    # Images of a group stay in one batch.
    whole = isinstance(reward, GroupReward)
    ends = set(accumulate(len(group) for group in in_groups(todo, items))) if whole else set()

    if on_progress:
        on_progress(label, 0, len(todo))
    for done, (key, i, ahead) in enumerate(_ahead(items, todo, areas, reward, pool, 2 * batch_size), start=1):
        if ahead.unreadable:
            found.broken[hashes[i]] = ahead.unreadable
        elif ahead.sha256 != hashes[i]:
            found.broken[hashes[i]] = "changed while it was being scored"
        elif ahead.prepared is None:
            found.failed[key] = Result({}, ahead.failed)
        else:
            batch.append((key, i, ahead.prepared))
        full = len(batch) >= batch_size or sum(_pixels(prepared) for _, _, prepared in batch) > PIXELS_AHEAD
        if full and (not whole or done in ends):
            flush()
        if on_progress:
            on_progress(label, done, len(todo))
    flush()
    return found


def _pixels(prepared: Prepared) -> int:
    """Return the pixels of a prepared image, or the values of a prepared tensor."""
    return prepared.width * prepared.height if isinstance(prepared, Image.Image) else prepared.numel()


def _measure(
    items: list[Item], batch: list[tuple[str, int, Prepared]], reward: Reward, proven: bool
) -> tuple[Known, Known]:
    """Return the scores of a batch by key, and apart from them the images on which the reward failed."""
    prompts = [items[i].prompt or "" for _, i, _ in batch]
    facts = [{**items[i].metadata, "prompt": items[i].prompt or ""} for _, i, _ in batch]
    measured = measure_batch(reward, [prepared for _, _, prepared in batch], prompts, facts, proven)
    found: tuple[Known, Known] = ({}, {})
    for (key, _, _), one in zip(batch, measured, strict=True):
        found[one.error is not None][key] = Result(_named(reward, one.values), one.reason)
    return found


def _named(reward: Reward, values: dict[str, float]) -> dict[str, float]:
    """Return values by the names they have in a row: "" for the score, the others by column."""
    return {("" if k == 0 else name): values[name] for k, name in enumerate(reward.columns)}


def _row(
    views: list[Item],
    sha256: str,
    broken: dict[str, str],
    rewards: dict[str, Reward],
    identities: dict[str, dict[str, Any]],
    known: Known,
    failures: dict[str, Known],
) -> dict[str, Any]:
    """Return an image's row; views: the image as each reward sees it."""
    item = views[0]
    unread = sha256.startswith("unread ")
    row: dict[str, Any] = {"image": item.name, "sha256": None if unread else sha256, "prompt": item.prompt}
    row["reason"] = broken.get(sha256, "")
    for view, (label, reward) in zip(views, rewards.items(), strict=True):
        not_scorable = _not_scorable(reward, view)
        result = failure = identity = None
        if not not_scorable:
            identity = with_facts(identities[label], view.metadata)
            key = key_of(sha256, view.prompt, identity)
            result, failure = known.get(key), failures[label].get(key)
        values = result.values if result else {}
        for k, name in enumerate(reward.columns):
            row[label if k == 0 else f"{label}.{name}"] = values.get("" if k == 0 else name, math.nan)
        row[label + REASON] = not_scorable or next((r.reason for r in (result, failure) if r), "")
        # Without an identity the row is tried again next time.
        row[label + IDENTITY] = identity if result else None
    return row


def _reason_of(row: dict[str, Any], label: str) -> str:
    """Return why a label has no score in a row; "" if it has one."""
    return row["reason"] or row[label + REASON] or ("" if math.isfinite(row[label]) else "not scored")
