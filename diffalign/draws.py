"""Make seeded random draws that depend on what they are for, and not on how the work is divided.

Every draw has its own counter generator, keyed by everything that names it: seed, stream, optimiser step, inner index,
group and member. So micro-batches, processes and resumed runs see the same numbers. The generator is numpy's Philox, on
the CPU, because `torch.Generator.manual_seed` keeps only 32 bits there and silently repeats.
"""

import hashlib

import numpy as np


def draw(
    seed: int,
    stream: str,
    *,
    step: int = 0,
    inner: int = 0,
    group: str | int | None = None,
    member: int | None = None,
) -> np.random.Generator:
    """Return the generator of one named draw: the same name gives the same numbers, another name independent ones.

    Draws that belong to a whole step leave out `group`; draws shared by the images of a group leave out `member`.
    """
    name = repr((int(seed), stream, int(step), int(inner), group, member)).encode()
    key = int.from_bytes(hashlib.blake2b(name, digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key))


def normal(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Return standard normal numbers, float32."""
    return generator.standard_normal(shape, dtype=np.float32)


def seed_of(seed: int, stream: str, group: str | int, member: int) -> int:
    """Return a 63-bit seed to store with an image, from which `draw` gives its initial noise again."""
    return int(draw(seed, stream, group=group, member=member).integers(0, 2**63 - 1))
