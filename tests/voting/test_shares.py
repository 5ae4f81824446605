"""Shares of won comparisons, worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from diffalign.voting.shares import won_shares

NAN = float("nan")


@pytest.mark.parametrize(
    ("votes", "shares"),
    [
        ([((0, 1), (1, 2))], [1, 0, NAN, NAN]),
        ([((2, 1), (2, 1))], [NAN, 1, 0, NAN]),
        ([((0, 1), (1, 1))], [0.5, 0.5, NAN, NAN]),
        ([((0, 1), (1, 2)), ((1, 2), (1, 2))], [1, 0.5, 0, NAN]),
        ([((0, 1), (1, 2)), ((1, 0), (1, 2)), ((0, 1), (1, 2))], [2 / 3, 1 / 3, NAN, NAN]),
        ([((3, 0, 1, 2), (1, 2, 2, 4))], [0.5, 0.5, 0, 1]),
        # 0, 1 and 2 are connected, and 3 to none of them.
        ([((0, 1), (1, 2)), ((2, 1), (1, 2))], [1, 0, 1, NAN]),
        # Two pairs that nothing connects: who of the one would win over the other is not known.
        ([((2, 3), (1, 2)), ((0, 1), (1, 2))], [1, 0, NAN, NAN]),
        ([], [NAN] * 4),
    ],
)
def test_shares(votes: list[tuple[tuple[int, ...], tuple[int, ...]]], shares: list[float]) -> None:
    np.testing.assert_array_equal(won_shares(votes, 4), np.array(shares, dtype=np.float64))
