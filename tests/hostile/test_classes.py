"""A few trials of every class of hostile input; `make hostile` runs thousands and prints the table of docs/security.md."""

from __future__ import annotations

import pytest

from hostile.classes import CLASSES, failures

QUICK = 2


@pytest.mark.parametrize("name", CLASSES)
def test_a_few_trials_hold(name: str) -> None:
    trials = range(QUICK * CLASSES[name][1])
    assert [(seed, fault) for seed, fault in failures(name, trials) if fault] == []
