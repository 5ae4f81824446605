"""Distributions of scores: the vectors of the read-out, and what two pictures' distributions say about each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffalign.errors import DiffalignError
from diffalign.rewards.score_distribution import LEVELS, SPAN, ScoreDistribution

LOGITS = [-2.0, -1, 0, 1, 2, 3, 2, 1, 0]
Q = [
    0.0031617861, 0.0085946258, 0.0233626151, 0.063506172, 0.1726276733, 0.4692506674, 0.1726276733, 0.063506172, 0.0233626151,
]  # fmt: skip
SLOPE = [
    -0.0078251243, -0.0169735804, -0.0344576677, -0.0619125661, -0.0819819667, 0.0117752434, 0.0906457066, 0.0650997779,
    0.0356301774,
]  # fmt: skip


def test_the_read_out_of_nine_logits() -> None:
    """Numbers computed apart from this code, in float64."""
    logits = torch.tensor(LOGITS, dtype=torch.float64).view(1, 1, 9).requires_grad_()
    found = ScoreDistribution.from_logits(logits)
    assert (
        found.probabilities.dtype == torch.float32
        and tuple(LEVELS) == (1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5)
        and SPAN == 4
    )
    assert found.probabilities.flatten().tolist() == pytest.approx(Q, abs=1e-7)
    assert found.mean.item() == pytest.approx(3.474906283138779, abs=1e-6)
    assert found.variance.item() == pytest.approx(0.3719679201, abs=1e-6)
    assert found.spread.item() == pytest.approx(0.3719679201**0.5, abs=1e-6)
    assert found.entropy.item() == pytest.approx(1.5462613398, abs=1e-6)
    assert -found.probabilities[0, 0, LEVELS.index(4.0)].log().item() == pytest.approx(1.7566181812, abs=1e-6)
    (slope,) = torch.autograd.grad(found.mean.sum(), logits)
    assert slope.flatten().tolist() == pytest.approx(SLOPE, abs=1e-6)


def test_half_precision_logits_are_widened_first() -> None:
    logits = torch.tensor(LOGITS).bfloat16().view(1, 1, 9)  # these nine are exact in bfloat16
    found = ScoreDistribution.from_logits(logits)
    assert found.mean.item() == pytest.approx(3.4749063, abs=1e-6)
    narrow = (logits.softmax(-1) * torch.tensor(LEVELS).bfloat16()).sum().item()
    assert narrow == pytest.approx(3.46875)  # what the trap gives


def test_a_mean_of_given_probabilities() -> None:
    found = ScoreDistribution(torch.tensor([[[0, 0, 0, 0, 0.10, 0.25, 0.45, 0.15, 0.05]]]))
    assert found.mean.item() == pytest.approx(3.9)


def test_extremes() -> None:
    sure = torch.zeros(1, 2, 9)
    sure[0, 0, 6] = sure[0, 1, 0] = 1
    found = ScoreDistribution(sure)
    assert found.mean.tolist() == [[4.0, 1.0]] and found.spread.tolist() == [[0.0, 0.0]]
    assert found.entropy.tolist() == [[0.0, 0.0]]  # 0 log 0 is 0
    halves = torch.zeros(1, 1, 9)
    halves[..., 0] = halves[..., 8] = 0.5
    assert ScoreDistribution(halves).spread.item() == pytest.approx(2.0)
    even = ScoreDistribution(torch.full((1, 1, 9), 1 / 9))
    assert even.entropy.item() == pytest.approx(np.log(9), abs=1e-6) and even.mean.item() == pytest.approx(3.0)


def test_the_probability_that_one_picture_wins() -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.dirichlet(np.ones(9), size=(3, 2)).astype(np.float32) for _ in range(2))
    found = ScoreDistribution(torch.tensor(a)).win_probability(ScoreDistribution(torch.tensor(b)))
    for i in range(3):
        for d in range(2):
            joint = np.outer(a[i, d], b[i, d])
            expected = sum(joint[s, t] * (1.0 if s > t else 0.5 if s == t else 0.0) for s in range(9) for t in range(9))
            assert found[i, d].item() == pytest.approx(expected, abs=1e-6)
    back = ScoreDistribution(torch.tensor(b)).win_probability(ScoreDistribution(torch.tensor(a)))
    assert torch.allclose(found + back, torch.ones(3, 2), atol=1e-6)
    # Equal means, yet one of the two usually wins: 3.0 for sure beside 2.5 mostly and 5.0 at times.
    sure, torn = torch.zeros(1, 1, 9), torch.zeros(1, 1, 9)
    sure[..., 4], torn[..., 3], torn[..., 8] = 1.0, 0.8, 0.2
    one, other = ScoreDistribution(sure), ScoreDistribution(torn)
    assert one.mean.item() == pytest.approx(other.mean.item()) and one.win_probability(other).item() == pytest.approx(
        0.8
    )


def test_dimensions_are_averaged_with_weights() -> None:
    p = torch.zeros(2, 3, 9)
    for d, level in enumerate((8, 4, 0)):
        p[:, d, level] = 1
    found = ScoreDistribution(p, dimensions=("alignment", "realism", "aesthetics"))
    assert found.aggregate().tolist() == pytest.approx([3.0, 3.0])
    assert found.aggregate([1, 0, 0]).tolist() == [5.0, 5.0]
    assert found.aggregate({"alignment": 3, "aesthetics": 1}).tolist() == pytest.approx([4.0, 4.0])
    for bad, words in (
        ({"beauty": 1}, "'beauty'"),
        ([1, 2], "3 dimensions"),
        ([0, 0, 0], "not all 0"),
        ([1, -1, 1], "below 0"),
    ):
        with pytest.raises(DiffalignError, match=words):
            found.aggregate(bad)


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(DiffalignError, match=r"\[B, dimensions, 9\]"):
        ScoreDistribution(torch.rand(2, 9))
    with pytest.raises(DiffalignError, match="2 dimensions of probabilities and 1 names"):
        ScoreDistribution(torch.rand(2, 2, 9), dimensions=("a",))
    with pytest.raises(DiffalignError, match="do not rise"):
        ScoreDistribution(torch.rand(1, 1, 2), levels=(2.0, 1.0))
    with pytest.raises(DiffalignError, match="cannot be compared"):
        ScoreDistribution(torch.rand(1, 1, 9)).win_probability(ScoreDistribution(torch.rand(1, 2, 9)))
