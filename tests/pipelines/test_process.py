"""Noise processes: identities against numpy, tables of the real schedules, and what they refuse."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from diffalign.errors import DiffalignError
from diffalign.pipelines.process import Diffusion, Flow, NoiseProcess

BETAS = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2  # "scaled_linear", as all Stable Diffusion models have it
ABAR = np.cumprod(1.0 - BETAS)


def diffusion(prediction_type: str = "epsilon", **options: Any) -> Diffusion:
    return Diffusion(torch.from_numpy(ABAR).float(), prediction_type, offset=1, **options)


PROCESSES = {"epsilon": diffusion(), "v_prediction": diffusion("v_prediction"), "flow": Flow(shift=3.0)}
TIMES = {"epsilon": [3.0, 250.0, 999.0], "v_prediction": [3.0, 250.0, 999.0], "flow": [0.01, 0.4, 1.0]}


def latents(seed: int) -> torch.Tensor:
    return torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def numpy_coefficients(kind: str, times: list[float]) -> tuple[np.ndarray, np.ndarray]:
    t = np.array(times)
    a, s = (1 - t, t) if kind == "flow" else (np.sqrt(ABAR[t.astype(int)]), np.sqrt(1 - ABAR[t.astype(int)]))
    return a.reshape(-1, 1, 1, 1), s.reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("kind", PROCESSES)
def test_noise_and_target_equal_numpy(kind: str) -> None:
    process, t = PROCESSES[kind], torch.tensor(TIMES[kind])
    x0, noise = latents(0), latents(1)
    a, s = numpy_coefficients(kind, TIMES[kind])
    np.testing.assert_allclose(process.add_noise(x0, noise, t), a * x0.numpy() + s * noise.numpy(), atol=2e-6)
    targets = {
        "epsilon": noise.numpy(),
        "v_prediction": a * noise.numpy() - s * x0.numpy(),
        "flow": noise.numpy() - x0.numpy(),
    }
    np.testing.assert_allclose(process.target(x0, noise, t), targets[kind], atol=2e-6)


@pytest.mark.parametrize("kind", PROCESSES)
def test_target_gives_back_x0_and_noise(kind: str) -> None:
    process, t = PROCESSES[kind], torch.tensor(TIMES[kind])
    x0, noise = latents(0), latents(1)
    x_t, target = process.add_noise(x0, noise, t), process.target(x0, noise, t)
    # epsilon at t = 999 divides by sqrt(abar) = 0.068
    torch.testing.assert_close(process.x0(x_t, target, t), x0, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(process.epsilon(x_t, target, t), noise, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", PROCESSES)
@pytest.mark.parametrize("space", ["native", "epsilon", "x0"])
def test_error_scale_is_the_ratio_of_squared_errors(kind: str, space: str) -> None:
    """Against the definition: scale * |prediction - target|^2 = |converted prediction - converted target|^2."""
    process, t = PROCESSES[kind], torch.tensor(TIMES[kind])
    x0, noise, off = latents(0), latents(1), latents(2)
    x_t, target = process.add_noise(x0, noise, t), process.target(x0, noise, t)
    convert = {"native": lambda p: p, "epsilon": lambda p: process.epsilon(x_t, p, t)}.get(
        space, lambda p: process.x0(x_t, p, t)
    )
    expected = (convert(target + off).double() - convert(target).double()).square().mean(dim=(1, 2, 3))
    found = process.error_scale(t, space).double() * off.double().square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-9)


def test_error_scale_of_flow_in_closed_form() -> None:
    t = torch.tensor([0.25, 0.5, 1.0])
    torch.testing.assert_close(Flow().error_scale(t, "epsilon"), torch.tensor([0.5625, 0.25, 0.0]))
    torch.testing.assert_close(Flow().error_scale(t, "x0"), torch.tensor([0.0625, 0.25, 1.0]))
    with pytest.raises(DiffalignError, match="error_space: unknown space 'latent'"):
        Flow().error_scale(t, "latent")


def test_alpha_table() -> None:
    abar = diffusion(final_alpha_cumprod=0.5).alpha_cumprod(torch.tensor([0.0, 500.0, 999.0, -1.0, -199.0]))
    torch.testing.assert_close(abar, torch.tensor([0.99915, 0.276332, 0.004660, 0.5, 0.5]), atol=1e-6, rtol=0)


def test_fractional_times_interpolate_sigma() -> None:
    sigma = np.sqrt((1 - ABAR) / ABAR)
    between = 0.25 * sigma[500] + 0.75 * sigma[501]
    found = diffusion().alpha_cumprod(torch.tensor([500.75]))
    assert float(found) == pytest.approx(1 / (1 + between**2), rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("leading", [751, 501, 251, 1, -1]),
        ("trailing", [999, 749, 499, 249, -1]),
        ("linspace", [999, 666, 333, 0, -1]),
    ],
)
def test_diffusion_schedules(kind: str, expected: list[float]) -> None:
    assert diffusion(spacing=kind).schedule(4).tolist() == expected


def test_flow_schedule_shifts_twice_as_diffusers_does() -> None:
    assert Flow(3.0).schedule(4).tolist() == pytest.approx([1, 0.8577, 0.6022, 0.00893, 0], abs=5e-5)
    assert Flow(1.0).schedule(4).tolist() == pytest.approx([1, 0.667, 0.334, 0.001, 0], abs=1e-6)


def test_inversion_equals_the_published_table() -> None:
    """DDIM inversion of x = 1 under eps(x) = 0.3 x, levels 1, 201, ..., 801, from abar_0: hand-checked values."""
    process = diffusion(final_alpha_cumprod=float(np.float32(ABAR[0])))
    x, path, times = torch.ones(1, 1, 1, 1), [], [process.clean, 1.0, 201.0, 401.0, 601.0, 801.0]
    for t, t_next in pairwise(times):
        x = process.invert_step(x, 0.3 * x, torch.tensor([t]), torch.tensor([t_next]))
        path.append(float(x))
    assert path == pytest.approx([1.0032136294, 1.0098431905, 0.8742597076, 0.6553740250, 0.4202071885], abs=1e-6)


@pytest.mark.parametrize("kind", PROCESSES)
def test_inverting_a_step_gives_the_start(kind: str) -> None:
    process = PROCESSES[kind]
    t, t_next = (torch.full((3,), value) for value in ((0.6, 0.3) if kind == "flow" else (601.0, 301.0)))
    x, x0 = latents(0), latents(1)
    # The same straight path (constant x0 and noise) seen from both ends.
    noise = latents(2)
    x = process.add_noise(x0, noise, t)
    lower = process.step(x, process.target(x0, noise, t), t, t_next)
    torch.testing.assert_close(lower, process.add_noise(x0, noise, t_next), atol=1e-5, rtol=1e-5)
    back = process.invert_step(lower, process.target(x0, noise, t_next), t_next, t)
    torch.testing.assert_close(back, x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", PROCESSES)
def test_ancestral_step_keeps_the_marginal_variance(kind: str) -> None:
    """From perfect predictions, x_next has mean a x0 and variance s^2: over noise and the step's own draw."""
    process = PROCESSES[kind]
    t, t_next = (torch.tensor([value]) for value in ((0.6, 0.3) if kind == "flow" else (601.0, 301.0)))
    generator = torch.Generator().manual_seed(0)
    shape = (1, 4, 256, 256)
    x0 = torch.full(shape, 0.7)
    noise, fresh = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    x = process.add_noise(x0, noise, t)
    found = process.step(x, process.target(x0, noise, t), t, t_next, noise=fresh)
    a, s = (float(c) for c in process.coefficients(t_next))
    assert float(found.mean()) == pytest.approx(a * 0.7, abs=0.01)
    assert float(found.std()) == pytest.approx(s, rel=0.01)
    assert not torch.allclose(found, process.step(x, process.target(x0, noise, t), t, t_next), atol=1e-3)


def test_times_follow_their_distribution() -> None:
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    times = diffusion().draw_times(u)
    assert times.dtype == torch.float32
    assert torch.equal(torch.bincount(times.long(), minlength=1000), torch.full((1000,), 100))
    flow = Flow().draw_times(u, "logit_normal", mean=0.5, std=1.5)
    quantile = 1 / (1 + math.exp(-(0.5 + 1.5 * 0.6744897502)))  # the normal's upper quartile
    assert float(flow.double().quantile(0.75)) == pytest.approx(quantile, abs=1e-4)
    shifted = Flow().draw_times(torch.tensor([0.25], dtype=torch.float64), shift=3.0)
    assert float(shifted) == pytest.approx(0.5)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("skip", [0, 3])
def test_times_of_the_schedule_come_up_alike(process: NoiseProcess, skip: int) -> None:
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    times = process.draw_times(u, "schedule", steps=10, skip=skip)
    visited = process.schedule(10)[skip:-1]
    for time in visited:
        assert int((times == time).sum()) == pytest.approx(1000 / len(visited), abs=1)
    assert torch.equal(times, times.sort().values), "larger draws are noisier"
    assert process.draw_times(torch.ones(1, dtype=torch.float64), "schedule", steps=10, skip=skip) == visited[0]


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("sampler", ["uniform", "logit_normal"])
def test_extreme_draws_stay_in_range(process: NoiseProcess, sampler: str) -> None:
    times = process.draw_times(torch.tensor([0.0, 1e-300, 1.0 - 1e-16, 1.0], dtype=torch.float64), sampler)
    if isinstance(process, Flow):
        assert bool(((times > 0) & (times <= 1)).all())
    else:
        assert bool(((times >= 0) & (times <= 999) & (times == times.floor())).all())
    with pytest.raises(DiffalignError, match=r"times\.sampler: unknown sampler 'cosine'"):
        process.draw_times(torch.tensor([0.5], dtype=torch.float64), "cosine")


def test_model_time() -> None:
    assert Flow().model_time(torch.tensor([0.25])).tolist() == [250.0]
    assert diffusion().model_time(torch.tensor([17.0])).tolist() == [17.0]


def test_all_is_float32_whatever_comes_in() -> None:
    x0, noise = latents(0), latents(1)
    for kind, process in PROCESSES.items():
        t = torch.tensor(TIMES[kind])
        exact = process.add_noise(x0.bfloat16().float(), noise.bfloat16().float(), t)
        assert torch.equal(process.add_noise(x0.bfloat16(), noise.bfloat16(), t), exact)
        stepped = process.step(x0.bfloat16(), noise.bfloat16(), t, t * 0.5)
        assert stepped.dtype == torch.float32


def test_steps_are_differentiable() -> None:
    for kind, process in PROCESSES.items():
        x, prediction = latents(0).requires_grad_(), latents(1).requires_grad_()
        t = torch.tensor(TIMES[kind])
        process.step(x, prediction, t, t * 0.5).sum().backward()
        assert x.grad is not None and prediction.grad is not None
        assert float(x.grad.abs().min()) > 0 and float(prediction.grad.abs().min()) > 0


def zero_snr() -> torch.Tensor:
    abar = torch.from_numpy(ABAR).float()
    root = abar.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()


def test_zero_terminal_snr_works_with_v_and_refuses_epsilon() -> None:
    process = Diffusion(zero_snr(), "v_prediction", spacing="trailing", zero_snr=True)
    t, x0, noise = torch.full((3,), 999.0), latents(0), latents(1)
    assert torch.equal(process.add_noise(x0, noise, t), noise)
    torch.testing.assert_close(process.target(x0, noise, t), -x0)
    torch.testing.assert_close(process.x0(noise, -x0, t), x0)
    assert bool(torch.isfinite(process.step(noise, -x0, t, torch.full((3,), 499.0))).all())
    assert bool(torch.isfinite(process.alpha_cumprod(torch.tensor([998.0, 998.5, 999.0]))).all())
    with pytest.raises(DiffalignError, match="zero terminal SNR"):
        Diffusion(zero_snr(), "epsilon")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: diffusion("sample"), "prediction_type 'sample' is not supported"),
        (lambda: diffusion(spacing="karras"), "timestep_spacing 'karras'"),
        (lambda: diffusion().schedule(0), "0 sampling steps"),
        (lambda: diffusion().schedule(1001), "1001 sampling steps"),
        (lambda: Flow(0.0), "shift must be a positive number"),
        (lambda: Flow().schedule(0), "at least 1"),
    ],
)
def test_refusals(build: Callable[[], object], message: str) -> None:
    with pytest.raises(DiffalignError, match=message):
        build()
