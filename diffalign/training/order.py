"""Which groups a step trains on: a function of seed and step alone, whatever the processes and micro-batches."""

from functools import lru_cache

import numpy as np

from diffalign.draws import draw


@lru_cache(maxsize=2)
def permutation(n_groups: int, seed: int, epoch: int) -> np.ndarray:
    """The order of all groups in one epoch, [n_groups]."""
    return draw(seed, "epoch", step=epoch).permutation(n_groups)


def groups_for_step(n_groups: int, groups_per_step: int, step: int, seed: int) -> list[int]:
    """Slice `step` of the endless concatenation of the epochs' permutations."""
    positions = range(step * groups_per_step, (step + 1) * groups_per_step)
    return [int(permutation(n_groups, seed, p // n_groups)[p % n_groups]) for p in positions]
