"""Distances between sets of images, against closed forms and by hand."""

import numpy as np
import pytest
from PIL import Image

from diffalign.evaluation.distance import frechet_distance, kernel_distance, recall, thumbnails


def test_frechet_of_gaussians() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((40_000, 2)), 2 * rng.standard_normal((40_000, 2)) + np.array([1.0, 0.0])
    assert frechet_distance(a, b) == pytest.approx(1 + 2 * (2 - 1) ** 2, rel=0.03)  # |mean|^2 + sum (s_a - s_b)^2
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-8)


def test_kernel_distance_by_hand_and_without_bias() -> None:
    a, b = np.array([[0.0], [1.0]]), np.array([[2.0], [0.0]])
    k = lambda x, y: (x * y + 1) ** 3  # noqa: E731
    expected = k(0, 1) + k(2, 0) - 2 * np.mean([k(0, 2), k(0, 0), k(1, 2), k(1, 0)])
    assert kernel_distance(a, b) == pytest.approx(expected)
    rng = np.random.default_rng(0)
    same = [kernel_distance(rng.standard_normal((50, 4)), rng.standard_normal((50, 4))) for _ in range(200)]
    assert abs(np.mean(same)) < 3 * np.std(same) / np.sqrt(200)


def test_recall_sees_a_lost_mode() -> None:
    rng = np.random.default_rng(0)
    both = np.concatenate([rng.normal(0, 0.1, (100, 2)), rng.normal(5, 0.1, (100, 2))])
    assert recall(both, both) == 1.0
    assert recall(both[:100], both) == pytest.approx(0.5, abs=0.02)
    collapsed = np.zeros((100, 2))
    assert recall(collapsed, both) == 0.0


def test_thumbnails() -> None:
    half = np.zeros((64, 64, 3), np.uint8)
    half[:, 32:] = (255, 0, 51)
    found = thumbnails([Image.fromarray(half)]).reshape(8, 8, 3)
    assert np.allclose(found[:, :4], 0) and np.allclose(found[:, 4:], [1, 0, 0.2])
