"""Paths of a sampler whose steps draw, as something to learn from: a step of a path as a noisy latent with a target.

A step from x at time t draws a ~ N(m, s^2), and m = m0 + c p is linear in the prediction p. So

    (a - m)^2 / 2 s^2 = w (p - target)^2,    target = (a - m0) / c,    w = c^2 / 2 s^2

and minus the log-probability of a step, but for its constant, is a weighted squared error of the prediction, mean over
elements. Whatever learns from errors of predictions thus learns from paths: with the old policy as the reference the
difference of two errors is the logarithm of a ratio of probabilities, and the gap of two predictions their divergence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.draws import draw, normal
from diffalign.pipelines.drawn_noise import initial_noise
from diffalign.pipelines.own_sampler import SamplerSteps
from diffalign.pipelines.process import NoiseProcess

Predict = Callable[[Tensor, Tensor], Tensor]
"""(x [N, C, h, w], t [N]) -> prediction [N, C, h, w]."""


@dataclass(frozen=True)
class PathSteps:
    """The steps of a sampler, of which those from `first` to before `end` draw and are learnt from.

    level: of their noise. guidance: the scale of classifier-free guidance in every prediction, 1 for none.
    """

    sampler: SamplerSteps
    first: int
    end: int
    level: float
    guidance: float = 1.0

    @property
    def times(self) -> Tensor:
        """The times at which the steps that draw begin, [n]."""
        return self.sampler.times[self.first : self.end]

    @property
    def stops(self) -> Tensor:
        """The times at which they end, [n]."""
        return self.sampler.stops[self.first : self.end]


@dataclass(frozen=True)
class Paths:
    """Paths of B groups of K images. states [B, K, n + 1, C, h, w] float32: before each step that draws, and after the last."""

    states: Tensor
    steps: PathSteps


@torch.no_grad()
def draw_paths(
    process: NoiseProcess, steps: PathSteps, predict: Predict, seeds: list[int], shape: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Draw an image for each seed: its latent [N, C, h, w], and the states of its path [N, n + 1, C, h, w].

    All noise of an image follows from its seed; the first is that of `initial_noise`. Steps outside of the window are
    deterministic.
    """
    states = [process.initial(initial_noise(seeds, shape))]
    for index, (now, then) in enumerate(zip(steps.sampler.times, steps.sampler.stops, strict=True)):
        x = states[-1]
        t, stop = now.expand(len(x)), then.expand(len(x))
        prediction = predict(x, t).to(x.device)
        if steps.first <= index < steps.end:
            mean, deviation = process.sde_step(x, prediction, t, stop, steps.level)
            fresh = [torch.from_numpy(normal(draw(seed, "path", step=index), shape)) for seed in seeds]
            states.append(mean + deviation * torch.stack(fresh))
        else:
            states.append(process.step(x, prediction, t, stop))
    return states[-1], torch.stack(states[steps.first : steps.end + 1], dim=1)


def step_target(
    process: NoiseProcess, x: Tensor, action: Tensor, t: Tensor, stop: Tensor, level: float
) -> tuple[Tensor, Tensor]:
    """Return target [N, C, h, w] and weight w [N] of steps that went from x at t to `action` at `stop`."""
    none = torch.zeros_like(x)
    start, deviation = process.sde_step(x, none, t, stop, level)
    slope = process.sde_step(none, torch.ones_like(x), t, stop, level)[0][:, :1, :1, :1]
    return (action - start) / slope, (slope.square() / (2.0 * deviation.square())).flatten()
