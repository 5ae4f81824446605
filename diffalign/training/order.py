"""Which groups a step trains on: a function of seed and step alone, whatever the processes and micro-batches.

Where groups have different shapes (aspect buckets), a step is made of units of `micro_batch` groups of one shape. Each
bucket gives its units from its own endless permutations, and epoch e takes floor((e + 1) n / unit) - floor(e n / unit) units
of a bucket of n groups, in an order drawn for the epoch. So after e epochs each group was met e times, less than a unit's
worth of its bucket being still to come; with one bucket it is the plain order.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from diffalign.draws import draw
from diffalign.errors import DiffalignError


@lru_cache(maxsize=2)
def permutation(n_groups: int, seed: int, epoch: int, stream: str = "epoch") -> np.ndarray:
    """Draw the order of all groups in one epoch, [n_groups]."""
    return draw(seed, stream, step=epoch).permutation(n_groups)


def groups_for_step(n_groups: int, groups_per_step: int, step: int, seed: int, stream: str = "epoch") -> list[int]:
    """Return slice `step` of the endless concatenation of the epochs' permutations."""
    positions = range(step * groups_per_step, (step + 1) * groups_per_step)
    return [int(permutation(n_groups, seed, p // n_groups, stream)[p % n_groups]) for p in positions]


class BucketOrder:
    """An order of groups, step by step. buckets: a number for each group; only groups of one number may share a unit."""

    def __init__(self, buckets: Sequence[int], unit: int, groups_per_step: int, seed: int) -> None:
        self.unit, self.groups_per_step, self.seed = unit, groups_per_step, seed
        numbers = np.asarray(buckets)
        self.members = [np.flatnonzero(numbers == number) for number in sorted(set(buckets))]

    def step(self, step: int) -> list[int]:
        """Return the groups of a step, [groups_per_step]."""
        if len(self.members) == 1:
            return groups_for_step(len(self.members[0]), self.groups_per_step, step, self.seed)
        units = self.groups_per_step // self.unit
        return [group for position in range(step * units, (step + 1) * units) for group in self._unit(position)]

    def _unit(self, position: int) -> list[int]:
        """Return the groups of the unit at a position of the endless sequence of units."""
        epoch = self._epoch(position)
        before = self._given(epoch)
        counts = tuple(n - b for n, b in zip(self._given(epoch + 1), before, strict=True))
        order, places_in_bucket = _units(counts, self.seed, epoch)
        here = position - sum(before)
        bucket = int(order[here])
        number = before[bucket] + int(places_in_bucket[here])
        own = self.members[bucket]
        places = range(number * self.unit, (number + 1) * self.unit)
        return [int(own[_own_permutation(len(own), self.seed, bucket, p // len(own))[p % len(own)]]) for p in places]

    def _given(self, epoch: int) -> list[int]:
        """Count the units that each bucket has given before an epoch."""
        return [epoch * len(own) // self.unit for own in self.members]

    def _epoch(self, position: int) -> int:
        """Return the epoch that holds a unit: the last one before which no more than `position` units were given."""
        total = sum(len(own) for own in self.members)
        epoch = position * self.unit // total  # never too late, as rounding down only delays units
        while sum(self._given(epoch + 1)) <= position:
            epoch += 1
        return epoch


@lru_cache(maxsize=2)
def _units(counts: tuple[int, ...], seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the bucket of each unit of an epoch, and how many units of that bucket come before it in the epoch."""
    order = draw(seed, "buckets", step=epoch).permutation(np.repeat(np.arange(len(counts)), counts))
    # Counted once an epoch: a step must not take longer where there are more groups.
    before = np.empty_like(order)
    before[np.argsort(order, kind="stable")] = np.concatenate([np.arange(count) for count in counts])
    return order, before


@lru_cache(maxsize=64)
def _own_permutation(n_groups: int, seed: int, bucket: int, epoch: int) -> np.ndarray:
    """Return the order of a bucket's groups in one of its rounds."""
    return draw(seed, "bucket", step=epoch, inner=bucket).permutation(n_groups)


def check_units(buckets: Sequence[int], unit: int, micro: int) -> None:
    """Raise DiffalignError where a micro-batch would hold groups of two units, and so perhaps of two shapes."""
    if len(set(buckets)) > 1 and unit % micro:
        raise DiffalignError(
            f"data.buckets: this number of processes cuts steps into {micro} groups, which do not divide train.micro_batch="
            f"{unit}; set train.micro_batch={micro}"
        )
