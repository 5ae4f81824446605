"""Steps that draw: the numbers of Flow-GRPO, the distribution that they keep, and errors that are log-probabilities."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from diffalign.objectives.few_step_policy import log_probability, ppo_loss
from diffalign.pipelines.own_sampler import SamplerSteps
from diffalign.pipelines.paths import PathSteps, draw_paths, step_target
from diffalign.pipelines.process import Diffusion, Flow, NoiseProcess
from diffalign.pipelines.sde import flow_sde_step, posterior_step

# t, t', x, v -> mean, deviation, x' under noise 0.5, its log-probability, that under v + 0.05, the deterministic x'
NUMBERS = [
    (0.5, 0.4, 1.0, 0.3, 0.91365, 0.22135944, 1.02432972, 0.46402896, 0.44957270, 0.97),
    (0.8, 0.7, -0.5, 0.2, -0.46365, 0.44271887, -0.24229056, -0.22911822, -0.23624750, -0.52),
    (0.1, 0.0, 0.3, -0.4, 0.34163333, 0.07378648, 0.37852657, 1.56264125, 1.51689999, 0.34),
]


def density(x: float, mean: float, deviation: float) -> float:
    """The logarithm of the normal density."""
    return -((x - mean) ** 2) / (2 * deviation**2) - np.log(deviation) - 0.5 * np.log(2 * np.pi)


@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 2e-8), (torch.float32, 1e-5)])
def test_the_step_of_flow_grpo(numbers: tuple[float, ...], dtype: torch.dtype, near: float) -> None:
    t, then, x, v, mean, deviation, after, log, other, ode = numbers

    def at(value: float) -> torch.Tensor:
        return torch.tensor([[value]], dtype=dtype)

    found, spread = flow_sde_step(at(x), at(v), at(t), at(then), 0.7)
    assert (float(found), float(spread)) == pytest.approx((mean, deviation), rel=near)
    assert float(found + 0.5 * spread) == pytest.approx(after, rel=near)
    assert density(after, float(found), float(spread)) == pytest.approx(log, rel=max(near, 1e-7))
    moved, _ = flow_sde_step(at(x), at(v + 0.05), at(t), at(then), 0.7)
    assert density(after, float(moved), float(spread)) == pytest.approx(other, rel=max(near, 1e-7))
    ratio = log_probability(at(after), moved, spread[:, 0]) - log_probability(at(after), found, spread[:, 0])
    assert float(ratio) == pytest.approx(other - log, abs=1e-5 if dtype == torch.float32 else 2e-8)
    assert float(flow_sde_step(at(x), at(v), at(t), at(then), 0.0)[0]) == pytest.approx(ode, rel=near)


def test_the_clipped_surrogate_at_the_first_row() -> None:
    new, old = torch.tensor([0.44957270], dtype=torch.float64), torch.tensor([0.46402896], dtype=torch.float64)
    for advantage, clip, wanted in (
        (1.5, 1e-4, -1.47847160),
        (1.5, 0.2, -1.47847160),
        (-1.5, 1e-4, 1.49985),
        (-1.5, 0.2, 1.47847160),
    ):
        loss, _ = ppo_loss(new, old, torch.tensor([advantage]), clip, clip)
        assert float(loss) == pytest.approx(wanted, rel=1e-7)


def test_a_step_from_pure_noise_is_finite() -> None:
    mean, deviation = flow_sde_step(*(torch.tensor([[v]]) for v in (1.0, 0.5, 1.0, 0.9)), 0.7)
    assert float(deviation) == pytest.approx(0.7 * np.sqrt(1 / 0.1) * np.sqrt(0.1), rel=1e-6)
    assert torch.isfinite(mean).all()


def test_a_flow_keeps_its_distribution() -> None:
    """x0 ~ N(0.7, 0.4^2) with its exact velocity: 0.6860 and 0.3925 at t = 0.02. A wrong sign moves both by more than 0.05."""
    mean, spread, paths = 0.7, 0.4, 40_000
    generator = torch.Generator().manual_seed(0)
    times = torch.linspace(0.98, 0.02, 201, dtype=torch.float64)
    x = (1 - 0.98) * (mean + spread * torch.randn(paths, 1, generator=generator, dtype=torch.float64))
    x = x + 0.98 * torch.randn(paths, 1, generator=generator, dtype=torch.float64)
    for t, then in pairwise(times):
        variance = ((1 - t) * spread) ** 2 + t**2
        centred = x - (1 - t) * mean
        velocity = t / variance * centred - mean - (1 - t) * spread**2 / variance * centred  # E[noise - x0 | x]
        drawn, deviation = flow_sde_step(x, velocity, t, then, 0.7)
        x = drawn + deviation * torch.randn(paths, 1, generator=generator, dtype=torch.float64)
    assert float(x.mean()) == pytest.approx(0.6860, abs=0.01)
    assert float(x.std()) == pytest.approx(np.sqrt((0.98 * 0.4) ** 2 + 0.02**2), abs=0.01)


@pytest.mark.parametrize("level", [0.5, 1.0])
def test_a_diffusion_model_keeps_its_distribution(level: float) -> None:
    mean, spread, paths = 0.7, 0.4, 40_000
    generator = torch.Generator().manual_seed(0)
    abar = torch.cos(torch.linspace(1.5, 0.1, 201, dtype=torch.float64)) ** 2
    first = abar[0]
    x = first.sqrt() * (mean + spread * torch.randn(paths, 1, generator=generator, dtype=torch.float64))
    x = x + (1 - first).sqrt() * torch.randn(paths, 1, generator=generator, dtype=torch.float64)
    for now, then in pairwise(abar):
        variance = now * spread**2 + 1 - now
        x0 = mean + now.sqrt() * spread**2 / variance * (x - now.sqrt() * mean)  # E[x0 | x]
        epsilon = (x - now.sqrt() * x0) / (1 - now).sqrt()
        drawn, deviation = posterior_step(x0, epsilon, now, then, level)
        x = drawn + deviation * torch.randn(paths, 1, generator=generator, dtype=torch.float64)
    last = abar[-1]
    assert float(x.mean()) == pytest.approx(float(last.sqrt()) * mean, abs=0.01)
    assert float(x.std()) == pytest.approx(float((last * spread**2 + 1 - last).sqrt()), abs=0.015)


def diffusion(kind: str) -> NoiseProcess:
    return Diffusion(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0), kind)


@pytest.mark.parametrize(
    ("process", "t", "stop"),
    [(Flow(), 0.6, 0.45), (Flow(), 1.0, 0.9), (diffusion("epsilon"), 600.0, 500.0), (diffusion("v_prediction"), 600.0, 500.0)],
)  # fmt: skip
def test_the_weighted_error_of_a_prediction_is_minus_a_log_probability(process: Any, t: float, stop: float) -> None:
    generator = torch.Generator().manual_seed(3)
    x, action, prediction, other = (torch.randn(3, 2, 4, 4, generator=generator) for _ in range(4))
    times, stops = torch.full((3,), t), torch.full((3,), stop)
    target, weight = step_target(process, x, action, times, stops, 0.7)
    for one in (prediction, other):
        mean, deviation = process.sde_step(x, one, times, stops, 0.7)
        wanted = (action - mean).double().square().mean(dim=(1, 2, 3)) / (2 * deviation.double().flatten() ** 2)
        found = weight * (one - target).square().mean(dim=(1, 2, 3))
        np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_paths_follow_from_seeds_and_draw_within_the_window_alone() -> None:
    process, times = Flow(), Flow().schedule(5)
    sampler = SamplerSteps(times[:-1], times[1:])

    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return 0.3 * x + t.view(-1, 1, 1, 1)

    steps = PathSteps(sampler, 1, 3, 0.7)
    latents, states = draw_paths(process, steps, predict, [5, 6], (2, 4, 4))
    again, alone = draw_paths(process, steps, predict, [6], (2, 4, 4))
    assert states.shape == (2, 3, 2, 4, 4) and steps.times.tolist() == times[1:3].tolist()
    torch.testing.assert_close(latents[1:], again)
    torch.testing.assert_close(states[1:], alone)
    x = states[:, 2]  # from here on the sampler is deterministic
    for now, then in pairwise(times[3:6]):
        x = process.step(x, predict(x, now.expand(2)), now.expand(2), then.expand(2))
    torch.testing.assert_close(x, latents)
