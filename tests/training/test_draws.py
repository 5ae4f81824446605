"""Draws depend on their name alone."""

import itertools

import numpy as np

from diffalign.draws import draw, normal, seed_of
from diffalign.training.order import groups_for_step


def test_same_name_same_numbers() -> None:
    a, b = (normal(draw(3, "noise", step=5, inner=2, group="g7", member=1), (4, 8)) for _ in range(2))
    assert np.array_equal(a, b) and a.dtype == np.float32


def test_every_part_of_the_name_counts() -> None:
    names = [
        {"seed": 0, "stream": "a"},
        {"seed": 1, "stream": "a"},
        {"seed": 2**32, "stream": "a"},  # torch's CPU generator would repeat seed 0 here
        {"seed": 0, "stream": "b"},
        {"seed": 0, "stream": "a", "step": 1},
        {"seed": 0, "stream": "a", "inner": 1},
        {"seed": 0, "stream": "a", "group": "1"},
        {"seed": 0, "stream": "a", "group": 1},
        {"seed": 0, "stream": "a", "member": 1},
    ]
    drawn = [normal(draw(n.pop("seed"), n.pop("stream"), **n), (16,)) for n in names]
    assert all(not np.array_equal(a, b) for a, b in itertools.combinations(drawn, 2))


def test_known_value() -> None:
    """Committed runs hang on these numbers: a change of the key is a change of every trajectory."""
    assert draw(0, "noise", step=1, group="g").integers(0, 2**63 - 1) == 7705967665841339417
    assert normal(draw(0, "time"), (20_000,)).mean() < 0.03


def test_seeds_differ_by_image() -> None:
    seeds = {seed_of(0, "sample", group, member) for group in range(50) for member in range(8)}
    assert len(seeds) == 400


def test_order_covers_every_epoch() -> None:
    taken = [g for step in range(10) for g in groups_for_step(10, 4, step, seed=1)]
    for epoch in range(4):
        assert sorted(taken[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert taken[:10] != taken[10:20]
