"""Form the groups of rewards that see images beside others of their prompt."""

from dataclasses import replace

import numpy as np

from diffalign.rewards.groupwise import GROUP, MEMBER
from diffalign.scoring.items import Item
from diffalign.scoring.plan import Scanned


def with_groups(items: list[Item], scanned: Scanned, largest: int) -> list[Item]:
    """Return the items with the metadata that a `GroupReward` reads: the hashes of its group, and its own.

    A group is the different readable images of one prompt. More than `largest` are cut into parts of nearly equal size,
    in the order of their hashes, so that an image's score depends on what is in its group alone.
    """
    members: dict[str, set[str]] = {}
    for item, sha256 in zip(items, scanned.hashes, strict=True):
        if item.prompt and sha256 not in scanned.broken:
            members.setdefault(item.prompt, set()).add(sha256)
    part_of: dict[tuple[str, str], list[str]] = {}
    for prompt, found in members.items():
        parts = np.array_split(sorted(found), -(-len(found) // largest))
        for part in parts:
            names = [str(name) for name in part]
            part_of |= {(prompt, name): names for name in names}
    return [
        replace(item, metadata={GROUP: part_of.get((item.prompt or "", sha256), [sha256]), MEMBER: sha256})
        for item, sha256 in zip(items, scanned.hashes, strict=True)
    ]
