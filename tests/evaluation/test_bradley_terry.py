"""Bradley-Terry fits against other solvers on the written-out loss: numpy's Newton steps, and scipy's simplex-free BFGS."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from diffalign.bradley_terry import fit_linear, log_loss, strengths, win_rates


def newton(x: np.ndarray, wins: np.ndarray, ridge: float) -> np.ndarray:
    w = np.zeros(x.shape[1])
    for _ in range(100):
        p = 1 / (1 + np.exp(-x @ w))
        hessian = (x * (p * (1 - p))[:, None]).T @ x + ridge * np.eye(len(w))
        w = w - np.linalg.solve(hessian, x.T @ (p - wins) + ridge * w)
    return w


@pytest.mark.parametrize(("rows", "columns", "ridge"), [(60, 5, 0.3), (40, 90, 2.0), (500, 20, 1e-2)])
def test_weights(rows: int, columns: int, ridge: float) -> None:
    rng = np.random.default_rng(rows)
    x = rng.normal(size=(rows, columns))
    wins = rng.choice([0.0, 0.5, 1.0], rows)  # with ties
    found = fit_linear(x, wins, ridge)
    assert found == pytest.approx(newton(x, wins, ridge), abs=2e-6)
    assert fit_linear(x, wins, ridge, rng.normal(size=columns)) == pytest.approx(found, abs=2e-6)  # convex: any start


def test_log_loss() -> None:
    assert log_loss(np.zeros(3), np.array([0.0, 0.5, 1.0])) == pytest.approx(np.log(2))
    assert log_loss(np.array([2.0]), np.array([1.0])) == pytest.approx(-np.log(1 / (1 + np.exp(-2))))


def by_bfgs(wins: np.ndarray, ridge: float) -> np.ndarray:
    def loss(s: np.ndarray) -> float:
        total = 0.5 * ridge * float(s @ s)
        for a in range(len(s)):
            for b in range(len(s)):
                total += wins[a, b] * float(np.log1p(np.exp(s[b] - s[a])))
        return total

    return np.asarray(minimize(loss, np.zeros(len(wins)), method="BFGS", options={"gtol": 1e-9}).x)


WINS = [
    np.array([[0, 7, 2.5], [3, 0, 4], [7.5, 6, 0]]),
    np.array([[0.0, 20.0], [0.0, 0.0]]),  # never lost: the ridge keeps it finite
    np.array([[0, 3, 0, 0], [1, 0, 0, 0], [0, 0, 0, 5], [0, 0, 5, 0.0]]),  # two halves that never met
]


@pytest.mark.parametrize("wins", WINS)
def test_strengths(wins: np.ndarray) -> None:
    found = strengths(wins, 0.05)
    assert found == pytest.approx(by_bfgs(wins, 0.05), abs=1e-4)
    assert found.sum() == pytest.approx(0, abs=1e-9)
    several = strengths(np.stack([wins, wins.T, 3 * wins]), 0.05)
    assert several[0] == pytest.approx(found, abs=1e-9) and several[1] == pytest.approx(-found, abs=1e-9)
    assert several[2] == pytest.approx(strengths(3 * wins, 0.05), abs=1e-9)


def test_win_rates() -> None:
    assert win_rates(np.array([[0.0, 30.0], [10.0, 0.0]]), 1e-9) == pytest.approx([0.75, 0.25], abs=1e-6)
    found = win_rates(WINS[0], 0.05)
    s = by_bfgs(WINS[0], 0.05)
    first = np.mean([1 / (1 + np.exp(s[b] - s[0])) for b in (1, 2)])
    assert found[0] == pytest.approx(first, abs=1e-4) and found.sum() == pytest.approx(1.5)
