"""Sampling steps that draw: mean and deviation of the next latent, for methods that need its probability (Flow-GRPO).

x, predictions, x0 and epsilon are [N, ...]; times and abar are [N, 1, ...]. `level` scales the noise: 0 is the deterministic
step. At any level images have the distribution at every time that the deterministic sampler gives them. Computed in the dtype
that comes in.
"""

from __future__ import annotations

import torch
from torch import Tensor


def flow_sde_step(x: Tensor, velocity: Tensor, t: Tensor, t_next: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of x at t_next < t, given x at t, for a flow (Liu et al. 2025, "Flow-GRPO", arXiv 2505.05470).

    sigma = level sqrt(t / (1 - t)), dt = t_next - t, mean = x (1 + sigma^2 dt / 2t) + v (1 + sigma^2 (1 - t) / 2t) dt,
    deviation sigma sqrt(-dt). At t = 1, where sigma is infinite, 1 - t is 1 - t_next, as in the released code.
    """
    dt = t_next - t
    share = t / (1.0 - torch.where(t >= 1.0, t_next, t))
    squared = level * level * share
    mean = x * (1.0 + squared / (2.0 * t) * dt) + velocity * (1.0 + squared * (1.0 - t) / (2.0 * t)) * dt
    return mean, (squared * -dt).sqrt()


def posterior_step(x0: Tensor, epsilon: Tensor, now: Tensor, then: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of the next latent of a diffusion model: DDIM's eq. 12 and 16 with eta = `level`.

    now, then: abar at the two times. level 1 has the variance of the DDPM posterior.
    """
    variance = level * level * ((1.0 - then) / (1.0 - now) * (1.0 - now / then)).clamp_min(0.0)
    direction = (1.0 - then - variance).clamp_min(0.0).sqrt()
    return then.sqrt() * x0 + direction * epsilon, variance.sqrt()
