"""The one loop of `diffalign score`: hash, find what is not known yet, decode ahead, score, write down.

Rewards run one after the other, so that one model at a time is in memory. A batch mixes prompts and picture sizes. Reading,
decoding and the reward's own `prepare` run in threads, two batches ahead, while the model works on the current one.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from diffalign.rewards import Reward
from diffalign.scoring.decode import Unreadable, decode
from diffalign.scoring.items import Item, digest
from diffalign.scoring.processes import Processes
from diffalign.scoring.store import IDENTITY, REASON, Result, Store, key_of, with_facts

Progress = Callable[[str, int, int], None]
"""(label, done, total) of this process."""


@dataclass
class Scores:
    """rows: one a picture, ready for the store. columns: of each label, the score first."""

    rows: list[dict[str, Any]]
    columns: dict[str, tuple[str, ...]]
    computed: int = 0
    known: int = 0
    failed: int = 0
    items: list[Item] = field(default_factory=list)


def score_items(
    items: list[Item],
    rewards: dict[str, Reward],
    store: Store,
    *,
    batch_size: int = 32,
    workers: int = 4,
    processes: Processes | None = None,
    on_progress: Progress | None = None,
) -> Scores:
    """Score every item with every reward (label -> reward) that has not scored it yet. Rows come back on all processes.

    A picture that cannot be read or decoded gets its reason and no score; so does one whose prompt a reward cannot use.
    """
    processes = processes or Processes()
    # All of them first: weights that are missing are said before an hour is spent on another reward.
    identities = {label: reward.identity() for label, reward in rewards.items()}
    with ThreadPoolExecutor(workers) as pool:
        hashes, broken = _scan(items, pool, processes)
        computed = known = 0
        for label, reward in rewards.items():
            wanted = _wanted(items, hashes, reward, identities[label])
            todo = [(key, i) for key, i in wanted.items() if key not in store.known and hashes[i] not in broken]
            known += sum(key in store.known for key in wanted)
            found, bad = _score(
                items, processes.share(todo), hashes, reward, store, batch_size, pool, label, on_progress
            )
            for results, reasons in processes.gather((found, bad)):
                store.known |= results
                broken |= reasons
                computed += len(results)
            reward.free()
            gc.collect()
    rows = [_row(item, hashes[i], broken, rewards, identities, store) for i, item in enumerate(items)]
    failed = sum(any(_reason_of(row, label) for label in rewards) for row in rows)
    return Scores(rows, {label: r.columns for label, r in rewards.items()}, computed, known, failed, items)


def _scan(items: list[Item], pool: ThreadPoolExecutor, processes: Processes) -> tuple[list[str], dict[str, str]]:
    """The hash of every item's bytes; for what cannot be read a stand-in, with the reason under it."""

    def one(item: Item) -> tuple[str, str]:
        try:
            return digest(item.origin.read()), ""
        except Unreadable as error:
            return f"unread {item.name}", str(error)

    hashes, broken = [""] * len(items), {}
    mine = processes.share(list(range(len(items))))
    found = [(i, *answer) for i, answer in zip(mine, pool.map(one, (items[i] for i in mine)), strict=True)]
    for part in processes.gather(found):
        for i, sha256, reason in part:
            hashes[i] = sha256
            if reason:
                broken[sha256] = reason
    return hashes, broken


def _wanted(items: list[Item], hashes: list[str], reward: Reward, identity: dict[str, Any]) -> dict[str, int]:
    """key -> an item that has it. Copies of a picture with the same prompt share their key and are scored once."""
    wanted: dict[str, int] = {}
    for i, item in enumerate(items):
        if not reward.reason_not_scorable(item.prompt, item.metadata):
            wanted.setdefault(key_of(hashes[i], item.prompt, with_facts(identity, item.metadata)), i)
    return wanted


def _ahead(
    items: list[Item], todo: list[tuple[str, int]], reward: Reward, pool: ThreadPoolExecutor, window: int
) -> Iterator[tuple[str, int, Any]]:
    """(key, item, prepared picture or Unreadable) in order, at most `window` of them in memory."""

    def one(i: int) -> tuple[str, Any]:
        sha256 = ""
        try:
            data = items[i].origin.read()
            sha256 = digest(data)
            return sha256, reward.prepare(decode(data))
        except Unreadable as error:
            return sha256, error

    pending: list[tuple[str, int, Future[tuple[str, Any]]]] = []
    for key, i in todo:
        pending.append((key, i, pool.submit(one, i)))
        if len(pending) > window:
            key_, i_, future = pending.pop(0)
            yield key_, i_, future.result()
    for key_, i_, future in pending:
        yield key_, i_, future.result()


def _score(
    items: list[Item],
    todo: list[tuple[str, int]],
    hashes: list[str],
    reward: Reward,
    store: Store,
    batch_size: int,
    pool: ThreadPoolExecutor,
    label: str,
    on_progress: Progress | None,
) -> tuple[dict[str, Result], dict[str, str]]:
    """This process's share; (new results, reasons of pictures that could not be decoded)."""
    results: dict[str, Result] = {}
    broken: dict[str, str] = {}
    batch: list[tuple[str, int, Any]] = []

    def flush() -> None:
        if batch:
            fresh = _measure(items, batch, reward)
            store.add(fresh)
            results.update(fresh)
            batch.clear()

    if on_progress:
        on_progress(label, 0, len(todo))
    for done, (key, i, (sha256, prepared)) in enumerate(_ahead(items, todo, reward, pool, 2 * batch_size), start=1):
        if isinstance(prepared, Unreadable):
            broken[hashes[i]] = str(prepared)
        elif sha256 != hashes[i]:
            broken[hashes[i]] = "changed while it was being scored"
        else:
            batch.append((key, i, prepared))
        if len(batch) == batch_size:
            flush()
        if on_progress:
            on_progress(label, done, len(todo))
    flush()
    return results, broken


def _measure(items: list[Item], batch: list[tuple[str, int, Any]], reward: Reward) -> dict[str, Result]:
    """Scores of a batch; where the GPU's memory does not hold it, of its halves."""
    prompts = [items[i].prompt or "" for _, i, _ in batch]
    facts = [{**items[i].metadata, "prompt": items[i].prompt or ""} for _, i, _ in batch]
    try:
        measured = reward.measure_prepared([prepared for _, _, prepared in batch], prompts, facts)
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise
        half = len(batch) // 2
    else:
        columns = {name: values.tolist() for name, values in measured.items()}
        return {key: Result(_named(reward, columns, n), reward.reasons[n]) for n, (key, _, _) in enumerate(batch)}
    torch.cuda.empty_cache()
    return _measure(items, batch[:half], reward) | _measure(items, batch[half:], reward)


def _named(reward: Reward, columns: dict[str, list[float]], n: int) -> dict[str, float]:
    """Values of picture n under the names they have in a row: "" for the score itself, the others by column."""
    return {("" if k == 0 else name): columns[name][n] for k, name in enumerate(reward.columns)}


def _row(
    item: Item,
    sha256: str,
    broken: dict[str, str],
    rewards: dict[str, Reward],
    identities: dict[str, dict[str, Any]],
    store: Store,
) -> dict[str, Any]:
    unread = sha256.startswith("unread ")
    row: dict[str, Any] = {"image": item.name, "sha256": None if unread else sha256, "prompt": item.prompt}
    row["reason"] = broken.get(sha256, "")
    for label, reward in rewards.items():
        identity = with_facts(identities[label], item.metadata)
        result = store.known.get(key_of(sha256, item.prompt, identity))
        not_scorable = reward.reason_not_scorable(item.prompt, item.metadata)
        values = result.values if result and not not_scorable else {}
        for k, name in enumerate(reward.columns):
            row[label if k == 0 else f"{label}.{name}"] = values.get("" if k == 0 else name, math.nan)
        row[label + REASON] = not_scorable or (result.reason if result else "")
        # Without an identity the row is tried again next time.
        row[label + IDENTITY] = identity if result and not not_scorable else None
    return row


def _reason_of(row: dict[str, Any], label: str) -> str:
    """Why a label has no score in a row, "" if it has."""
    return row["reason"] or row[label + REASON] or ("" if math.isfinite(row[label]) else "not scored")
