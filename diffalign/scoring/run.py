"""The loop of `diffalign score`: hash, find what is not scored yet, decode ahead, score, store.

Rewards run one after another, so that only one model is in memory. A batch mixes prompts and image sizes. Reading,
decoding and the reward's own `prepare` run in threads, two batches ahead, while the model works on the current one.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from diffalign import stopping
from diffalign.data.containers import AddressOrigin
from diffalign.progress import OnNamedImages
from diffalign.rewards import Reward
from diffalign.rewards.groupwise import GroupReward
from diffalign.scoring.batches import Found, read_ahead, score_batch
from diffalign.scoring.groups import with_groups
from diffalign.scoring.items import Item, scan
from diffalign.scoring.on_cluster import OnCluster
from diffalign.scoring.plan import Batch, Scanned, make_plan, not_scorable
from diffalign.scoring.processes import Processes
from diffalign.scoring.store import IDENTITY, REASON, Known, Store, key_of, with_facts


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


def score_items(
    items: list[Item],
    rewards: dict[str, Reward],
    store: Store,
    *,
    batch_size: int = 32,
    workers: int = 4,
    processes: Processes | None = None,
    cluster: OnCluster | None = None,
    keep: bool = False,
    on_progress: OnNamedImages | None = None,
) -> Scores:
    """Score every item with every reward (label -> reward) that has not scored it yet; all processes get all rows.

    An image that cannot be read or decoded gets the reason and no score; so does one whose prompt a reward cannot use, and
    one on which a reward fails. cluster: scores the batches instead of this process. keep: leave the
    rewards in memory, for a caller who has built them and calls again.
    """
    processes = processes or Processes()
    # Of all rewards first, so that missing weights are reported before an hour is spent on another reward. A reward that
    # can score none of the images is not asked: it needs no weights.
    usable = {label for label, r in rewards.items() if any(not not_scorable(r, item) for item in items)}
    identities = {label: rewards[label].identity() for label in usable}
    with ThreadPoolExecutor(workers) as pool:
        scanned = _scan(items, pool, processes, cluster)
        computed = known = 0
        failures: dict[str, Known] = {label: {} for label in rewards}
        views = dict.fromkeys(rewards, items)  # a judge of groups reads each image's group as metadata
        for label, reward in rewards.items():
            if label not in usable:
                continue
            if isinstance(reward, GroupReward):
                views[label] = with_groups(items, scanned, reward.largest)
            # This process scores its share of the batches.
            plan = make_plan(views[label], scanned, reward, identities[label], store.known, batch_size)
            known += plan.known
            batches = processes.share(plan.batches)
            if cluster is None:
                parts = _parts(batches, reward, pool)
            else:
                parts = cluster.parts(label, batches, identities[label], pool, workers)
            mine = _keep(label, parts, sum(len(batch.cells) for batch in batches), store, on_progress)
            # All processes learn all results, so that each could write the rows.
            for found in processes.gather(mine):
                store.known |= found.results
                scanned.broken |= found.broken
                failures[label] |= found.failed
                computed += len(found.results)
            if not keep:  # the next reward may need all of the GPU's memory
                reward.free()
                gc.collect()
    rows = []
    for i, item in enumerate(items):
        seen = [views[label][i] for label in rewards]
        rows.append(_row(item, seen, scanned.hashes[i], scanned, rewards, identities, store.known, failures))
    failed = sum(any(_reason_of(row, label) for label in rewards) for row in rows)
    return Scores(rows, {label: r.columns for label, r in rewards.items()}, computed, known, failed, items)


def _scan(items: list[Item], pool: ThreadPoolExecutor, processes: Processes, cluster: OnCluster | None) -> Scanned:
    """Read every image once, for its hash and size; a cluster reads those at an address."""
    scanned = Scanned([""] * len(items), [0] * len(items), {})
    mine = processes.share(list(range(len(items))))
    there = [i for i in mine if cluster is not None and isinstance(items[i].origin, AddressOrigin)]
    here = [i for i in mine if i not in set(there)] if there else mine
    found = [(i, *answer) for i, answer in zip(here, pool.map(scan, (items[i] for i in here)), strict=True)]
    if cluster is not None:
        found += [(i, *answer) for i, answer in cluster.scan({i: items[i] for i in there})]
    for part in processes.gather(found):
        for i, sha256, pixels, reason in part:
            scanned.hashes[i], scanned.areas[i] = sha256, pixels
            if reason:
                scanned.broken[sha256] = reason
    return scanned


def _parts(batches: list[Batch], reward: Reward, pool: ThreadPoolExecutor) -> Iterator[Found]:
    """Yield what this process finds in batches."""
    proven = False
    window = 2 * max((len(batch.cells) for batch in batches), default=0)
    read = read_ahead((cell for batch in batches for cell in batch.cells), reward, pool, window)
    for batch in batches:
        cells = zip(batch.cells, islice(read, len(batch.cells)), strict=True)
        for part in score_batch(reward, cells, proven):
            proven = proven or bool(part.results)
            yield part


def _keep(label: str, parts: Iterator[Found], total: int, store: Store, on_progress: OnNamedImages | None) -> Found:
    """Write the scores of each part to the journal as it comes; return all of them."""
    found = Found()
    if on_progress:
        on_progress(label, 0, total)
    while True:
        with stopping.deferred():
            if (part := next(parts, None)) is None:
                return found
            store.add(part.results)
        if store.path is not None:
            stopping.keep(f"{len(store.known)} scores are")
        stopping.check()
        found.add(part)
        if on_progress:
            on_progress(label, found.images, total)


def _row(
    item: Item,
    views: list[Item],
    sha256: str,
    scanned: Scanned,
    rewards: dict[str, Reward],
    identities: dict[str, dict[str, Any]],
    known: Known,
    failures: dict[str, Known],
) -> dict[str, Any]:
    """Return the row of an image; views: the image as each reward sees it."""
    unread = sha256.startswith("unread ")
    row: dict[str, Any] = {"image": item.name, "sha256": None if unread else sha256, "prompt": item.prompt}
    row["reason"] = scanned.broken.get(sha256, "")
    for view, (label, reward) in zip(views, rewards.items(), strict=True):
        refused = not_scorable(reward, view)
        result = failure = identity = None
        if not refused:
            identity = with_facts(identities[label], view.metadata)
            key = key_of(sha256, view.prompt, identity)
            result, failure = known.get(key), failures[label].get(key)
        values = result.values if result else {}
        for k, name in enumerate(reward.columns):
            row[label if k == 0 else f"{label}.{name}"] = values.get("" if k == 0 else name, math.nan)
        row[label + REASON] = refused or next((r.reason for r in (result, failure) if r), "")
        # Without an identity the row is tried again next time.
        row[label + IDENTITY] = identity if result else None
    return row


def _reason_of(row: dict[str, Any], label: str) -> str:
    """Return why a label has no score in a row; "" if it has one."""
    return row["reason"] or row[label + REASON] or ("" if math.isfinite(row[label]) else "not scored")
