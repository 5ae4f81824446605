"""Fit strengths to comparisons by the Bradley-Terry model: P(a is chosen over b) = 1 / (1 + exp(s_b - s_a)).

A tie is half a win for either side. A ridge keeps every strength finite, also of a side that never lost. Both problems are
convex, so each has one solution, whatever the start.
"""

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

NEWTON_STEPS = 50
CONVERGED = 1e-10


def fit_linear(differences: np.ndarray, wins: np.ndarray, ridge: float, start: np.ndarray | None = None) -> np.ndarray:
    """Return the weights w [D] that minimise sum_i log(1 + exp(z_i)) - wins_i z_i + ridge / 2 |w|^2, with z = X w.

    differences: X [N, D], features of the first side minus those of the second. wins: [N], 1 where the first was chosen, 0
    where the second was, 0.5 for a tie. ridge: above 0. start: weights to begin at, which save time and change nothing.
    """

    def loss_and_gradient(weights: np.ndarray) -> tuple[float, np.ndarray]:
        z = differences @ weights
        loss = np.logaddexp(0.0, z).sum() - wins @ z + 0.5 * ridge * weights @ weights
        return float(loss), differences.T @ (expit(z) - wins) + ridge * weights

    begin = np.zeros(differences.shape[1]) if start is None else start
    options = {"maxiter": 10_000, "maxfun": 20_000, "ftol": 1e-15, "gtol": 1e-8}
    return np.asarray(minimize(loss_and_gradient, begin, jac=True, method="L-BFGS-B", options=options).x)


def log_loss(z: np.ndarray, wins: np.ndarray) -> float:
    """Return the mean of log(1 + exp(z)) - wins z over comparisons [N]: what `fit_linear` minimises, without the ridge."""
    return float(np.mean(np.logaddexp(0.0, z) - wins * z)) if len(z) else float("nan")


def strengths(wins: np.ndarray, ridge: float) -> np.ndarray:
    """Return the strengths [..., M] of M sides from wins [..., M, M]; entry (a, b) counts how often a was chosen over b.

    They minimise -sum wins_ab log P(a over b) + ridge / 2 |s|^2 and sum to 0. Leading axes are separate problems, solved
    together by Newton's method: resamples of a bootstrap, for example.
    """
    wins = np.asarray(wins, dtype=np.float64)
    played = wins + np.swapaxes(wins, -1, -2)
    found = np.zeros(wins.shape[:-1])
    eye = np.eye(wins.shape[-1])
    for _ in range(NEWTON_STEPS):
        chance = expit(found[..., :, None] - found[..., None, :])
        gradient = (played * chance - wins).sum(-1) + ridge * found
        spread = played * chance * (1 - chance)
        hessian = eye * (spread.sum(-1)[..., None] + ridge) - spread
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        # Where a side always wins, a whole step from far away overshoots; the ridge then pulls it back slowly.
        step /= np.maximum(1.0, np.abs(step).max(-1, keepdims=True) / 2)
        found = found - step
        if float(np.abs(step).max(initial=0.0)) < CONVERGED:
            break
    return np.asarray(found)


def win_rates(wins: np.ndarray, ridge: float) -> np.ndarray:
    """Return for each of M sides [..., M] the chance that it is chosen over one of the others, on average over them.

    wins: as `strengths` takes it. With two sides it is the share of wins, drawn a little to 1/2 by the ridge.
    """
    found = strengths(wins, ridge)
    chance = expit(found[..., :, None] - found[..., None, :])
    return np.asarray((chance.sum(-1) - 0.5) / (found.shape[-1] - 1))
