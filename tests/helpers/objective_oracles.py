"""Groups for objectives, and RankDPO and GDRO written as loops in numpy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffalign.objectives import GDRO, GroupErrors

UNANIMOUS, S = [1.0, 2 / 3, 1 / 3, 0.0], [-4e-4, 1e-4, -2e-4, 3e-4]


TOLERANCE = 1e-6


def group_of(d: Any, labels: Any, order: Any = None) -> GroupErrors:
    """A batch of one group with advantages d, float64, whose policy error takes gradients."""
    reference = torch.full((1, len(d)), 0.25, dtype=torch.float64)
    policy = (reference + torch.tensor([d], dtype=torch.float64)).requires_grad_()
    given = torch.tensor([labels], dtype=torch.float64)
    return GroupErrors(policy, reference, given, order=None if order is None else torch.tensor([order]))


def loss_and_gradient(objective: Callable[[GroupErrors], Any], group: GroupErrors) -> tuple[float, list[float]]:
    out = objective(group)
    assert out.loss.dtype == torch.float64 and out.loss.shape == (1,)
    assert all(v.shape == (1,) for v in out.metrics.values())
    (gradient,) = torch.autograd.grad(out.loss.sum(), group.policy_error)
    return out.loss.item(), gradient[0].tolist()


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def rankdpo(d: Any, phi: Any, beta: float, ranks: Any, gain_only: bool = False) -> tuple[float, np.ndarray, float]:
    """Equations 5 to 7 with loops: loss, its gradient for d, the sum of the weights. `ranks` start at 1."""
    loss, total, gradient = 0.0, 0.0, np.zeros(len(d))
    inverse = [1 / math.log(1 + r) for r in ranks]
    for i in range(len(d)):
        for j in range(len(d)):
            if phi[i] > phi[j]:
                delta = abs((2 ** phi[i] - 1) - (2 ** phi[j] - 1)) * (1 if gain_only else abs(inverse[i] - inverse[j]))
                inside = -beta * (d[i] - d[j])
                loss -= delta * log_sigmoid(inside)
                pull = delta * beta / (1 + math.exp(inside))
                gradient[i] += pull
                gradient[j] -= pull
                total += delta
    return loss, gradient, total


def gdro(s: Any, rewards: Any, tau: float, order: Any = None) -> tuple[float, np.ndarray]:
    """Equation 7 with loops, and its gradient for s: sum over places of p - q. Ties follow `order`, else position."""
    turn = sorted(range(len(s)), key=lambda i: (-rewards[i], order[i] if order is not None else i))
    s, r = np.array(s)[turn], np.array(rewards)[turn]
    loss, gradient = 0.0, np.zeros(len(s))
    for i in range(len(s) - 1):
        p = np.exp(s[i:] - s[i:].max())
        q = np.exp((r[i:] - r[i:].max()) / tau) if tau else np.eye(len(s) - i)[0]
        p, q = p / p.sum(), q / q.sum()
        loss += math.log(np.exp(s[i:]).sum()) - float(q @ s[i:])
        gradient[i:] += p - q
    back = np.empty(len(s))
    back[turn] = gradient
    return loss, back


def implicit(s: Any, rewards: Any, tau: float, order: Any = None) -> tuple[float, list[float]]:
    """GDRO's loss and its gradient for s = -d (beta 1, gamma 0)."""
    loss, gradient = loss_and_gradient(GDRO(1.0, tau, 0.0), group_of([-v for v in s], rewards, order))
    return loss, [-g for g in gradient]


def random_group(seed: int, groups: int = 6, k: int = 5, steps: int = 0) -> GroupErrors:
    """Random errors and labels; `steps` > 0 puts the labels on a grid, so that many are tied."""
    generator = torch.Generator().manual_seed(seed)
    policy, reference, labels = (torch.rand(groups, k, generator=generator, dtype=torch.float64) for _ in range(3))
    if steps:
        labels = (labels * steps).round() / steps
    order = torch.stack([torch.randperm(k, generator=generator) for _ in range(groups)])
    return GroupErrors(policy.requires_grad_(), reference, labels, order=order)


def numpy_errors(kind: str) -> tuple[Tensor, Tensor]:
    """Mean errors of two toy models on four images of eight elements: epsilon prediction, or velocity at t = 0.3."""
    j = np.arange(8)
    x = np.array([np.sin(0.7 * i + 0.3 * j) for i in range(4)])
    noise = np.array([np.cos(0.5 * j + (0.2 * i if kind == "independent" else 0.0)) for i in range(4)])
    if kind == "flow":
        x_t, target = 0.7 * x + 0.3 * noise, noise - x
        policy, reference = 0.9 * x_t - 0.1, 0.8 * x_t
    else:
        x_t, target = 0.8 * x + 0.6 * noise, noise
        policy, reference = 0.55 * x_t + 0.02, 0.5 * x_t
    errors = [((target - p) ** 2).mean(1) for p in (policy, reference)]
    return torch.from_numpy(errors[0])[None], torch.from_numpy(errors[1])[None]
