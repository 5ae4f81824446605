"""Aggregation against numbers worked out by hand from the papers' equations."""

from __future__ import annotations

import numpy as np
import pytest

from diffalign.errors import DiffalignError
from diffalign.rewards.aggregate import Calibration, corrected_score, dvao, gated, vote_shares, weighted_sum

# HPSv2.1, MPS (images 2 and 3 tie), PickScore, VQAScore, ImageReward
SYNPIC = np.array(
    [
        [0.281, 0.263, 0.274, 0.290],
        [11.2, 10.1, 10.1, 12.4],
        [21.9, 21.4, 22.0, 22.6],
        [0.81, 0.88, 0.74, 0.69],
        [0.35, -0.10, 0.62, 1.05],
    ]
)
R1, R2 = [1.0, 1, 0, 0, 0, 1], [0.80, 0.78, 0.82, 0.79, 0.81, 0.80]


def by_counting(scores: np.ndarray) -> list[float]:
    """Algorithm 1 of RankDPO with loops."""
    rewards, images = scores.shape
    shares = []
    for i in range(images):
        wins = compared = 0
        for r in range(rewards):
            for j in range(images):
                if i != j and not np.isnan(scores[r, i]) and not np.isnan(scores[r, j]):
                    compared += 1
                    wins += scores[r, i] > scores[r, j]
        shares.append(wins / compared if compared else np.nan)
    return shares


def test_vote_shares() -> None:
    shares = vote_shares(SYNPIC)
    assert shares.tolist() == pytest.approx(by_counting(SYNPIC))
    assert shares.sum() == pytest.approx(4 / 2 - 1 / 15)  # one tie of 30 comparisons gives nobody a vote
    broken = SYNPIC.copy()
    broken[2, 1] = broken[4, 3] = np.nan
    assert vote_shares(broken).tolist() == pytest.approx(by_counting(broken))
    assert np.isnan(vote_shares(np.full((2, 3), np.nan))).all()  # never compared: no share, which is not the lowest one
    unscored = np.array([[0.9, np.nan, 0.2], [np.nan, np.nan, np.nan]])
    assert vote_shares(unscored).tolist() == pytest.approx([1, np.nan, 0], nan_ok=True)
    # A voter of weight 0 has no say: neither its order nor what it could not score counts.
    voters = np.array([[np.nan, 0.9, 0.1], [0.3, 0.2, 0.1]])
    assert vote_shares(voters, np.array([0.0, 1.0])).tolist() == vote_shares(voters[1:]).tolist() == [1, 0.5, 0]
    assert vote_shares(voters, np.array([1.0, 0.0])).tolist() == pytest.approx([np.nan, 1, 0], nan_ok=True)
    assert vote_shares(np.exp(SYNPIC / 7)).tolist() == pytest.approx(shares.tolist())


def test_weighted_sum_uses_stored_constants() -> None:
    calibrations = [Calibration(0.27, 0.01), Calibration(21.0, 1.5)]
    scores = np.array([[0.28, 0.26, np.nan], [21.0, 24.0, 22.5]])
    assert weighted_sum(scores, [1, 2], calibrations)[:2].tolist() == pytest.approx([1.0, -1 + 4.0])
    assert np.isnan(weighted_sum(scores, [1, 2], calibrations)[2])
    assert weighted_sum(scores, [0, 2], calibrations).tolist() == pytest.approx([0, 4, 2])  # an unused NaN is no NaN
    # A group's scale survives: twice the spread is twice the preference.
    assert weighted_sum(scores[1:], [1], calibrations[1:]).std() == pytest.approx(scores[1].std() / 1.5)
    found = Calibration.of(np.array([1.0, 3.0, np.nan]))
    assert (found.mean, found.std) == (2.0, 1.0)
    with pytest.raises(DiffalignError, match="without any spread"):
        Calibration.of(np.array([2.0, 2.0]))
    with pytest.raises(DiffalignError, match="one weight a reward"):
        weighted_sum(scores, [1], calibrations)
    with pytest.raises(DiffalignError, match="not negative"):
        weighted_sum(scores, [1, -1], calibrations)


def test_dvao() -> None:
    advantages, weights = dvao(np.array([R1, R2]), [0.5, 0.5])
    assert weights.tolist() == pytest.approx([0.97483, 0.02517], abs=5e-6)
    assert advantages.tolist() == pytest.approx([0.97483, 0.935837, -0.935837, -0.994327, -0.955333, 0.97483], abs=2e-6)
    assert np.argsort(-advantages, kind="stable").tolist() == [0, 5, 1, 2, 4, 3]
    assert (advantages**2).mean() == pytest.approx(0.925586, abs=1e-6)
    # It ranks as the plain sum does, and its advantages add up to nothing.
    assert np.argsort(advantages).tolist() == np.argsort(np.array(R1) + R2).tolist()
    assert advantages.sum() == pytest.approx(0, abs=1e-12)
    flat, none = dvao(np.ones((2, 4)))
    assert flat.tolist() == [0] * 4 and none.tolist() == [0, 0]
    partly, _ = dvao(np.array([[1.0, 0.0, np.nan]]))
    assert partly[:2].tolist() == pytest.approx([1, -1]) and np.isnan(partly[2])


def test_gated_puts_constraints_first() -> None:
    preference = np.array([9.0, 1.0, 5.0, 5.0, np.nan])
    passed = np.array([[False, True, True, True, True], [True, True, True, True, True]])
    found = gated(preference, passed)
    assert np.isnan(found[4])
    assert found[:4].tolist() == pytest.approx([1 + 3 / 5, 2 + 0, 2 + 1 / 5, 2 + 1 / 5])
    assert found[0] < found[1] < found[2] == found[3]
    assert gated(preference * 1e6, passed)[:4].tolist() == found[:4].tolist()


def test_corrected_score() -> None:
    found = corrected_score(np.array([0.8721, 0.954]), np.array([3.4244, 3.2945]))
    assert found.tolist() == pytest.approx([0.5701, 0.4810], abs=1e-4)
    assert np.isnan(corrected_score(np.array([1.0]), np.array([np.nan]))[0])
