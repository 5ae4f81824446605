"""Form the groups of rewards that see images beside others of their prompt."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from diffalign.rewards.groupwise import GROUP, MEMBER
from diffalign.scoring.items import Item


def with_groups(items: list[Item], hashes: list[str], broken: Mapping[str, str], largest: int) -> list[Item]:
    """Return the items with the metadata that a `GroupReward` reads: the hashes of its group, and its own.

    A group is the different readable images of one prompt. More than `largest` are cut into parts of nearly equal size,
    in the order of their hashes, so that an image's score depends on what is in its group alone.
    """
    members: dict[str, set[str]] = {}
    for item, sha256 in zip(items, hashes, strict=True):
        if item.prompt and sha256 not in broken:
            members.setdefault(item.prompt, set()).add(sha256)
    part_of: dict[tuple[str, str], list[str]] = {}
    for prompt, found in members.items():
        parts = np.array_split(sorted(found), -(-len(found) // largest))
        for part in parts:
            names = [str(name) for name in part]
            part_of |= {(prompt, name): names for name in names}
    return [
        replace(item, metadata={GROUP: part_of.get((item.prompt or "", sha256), [sha256]), MEMBER: sha256})
        for item, sha256 in zip(items, hashes, strict=True)
    ]


def in_groups(todo: list[tuple[str, int]], items: list[Item]) -> list[list[tuple[str, int]]]:
    """Return (key, item) pairs by group, in the order of each group's first one."""
    groups: dict[tuple[str, ...], list[tuple[str, int]]] = {}
    for key, i in todo:
        groups.setdefault((items[i].prompt or "", *items[i].metadata[GROUP]), []).append((key, i))
    return list(groups.values())
