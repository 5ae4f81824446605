"""Log-probabilities of a few-step sampler's stochastic transitions, and the clipped objective of PPO on them.

A transition draws a = mean + rho z. The last one of a sampler has rho = 0 and no density, so PPO cannot use it.
Log-probabilities are *means* over elements: summed over 65,536 of them, a change of 0.01 in the mean already gives ratios
far beyond any clip. Clips are then of the order of 1e-5 (RTDMD, arXiv:2605.26108). Compute in float32: bfloat16's noise
is larger than that.
"""

from typing import Literal

import torch
from torch import Tensor

Reduction = Literal["mean", "sum", "simple"]


def log_probability(action: Tensor, mean: Tensor, rho: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Return log N(action; mean, rho^2) without its constant, [N], reduced over elements by mean or sum; rho [N] > 0.

    simple: -mean|a - mean|^2, without 1 / (2 rho^2), as in RTDMD's code for CPS; that is no likelihood.
    """
    squares = (action - mean).square().flatten(1)
    if reduction == "simple":
        return -squares.mean(dim=1)
    total = squares.mean(dim=1) if reduction == "mean" else squares.sum(dim=1)
    return -total / (2.0 * rho.square())


def ppo_loss(new: Tensor, old: Tensor, advantage: Tensor, clip_low: float, clip_high: float) -> tuple[Tensor, Tensor]:
    """Return -min(r A, clip(r, 1 - low, 1 + high) A) and r = exp(new - old), each [N] (Schulman et al. 2017, eq. 7)."""
    ratio = (new - old.detach()).exp()
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    return -torch.minimum(ratio * advantage, clipped * advantage), ratio
