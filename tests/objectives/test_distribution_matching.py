"""Distribution matching against numbers computed apart, and against what a group may and may not do."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffalign.objectives.distribution_matching import (
    Scale,
    guided,
    matching_loss,
    mean_size,
    normalised,
    split_direction,
)

X = torch.tensor([[0.5, -1.0], [2.0, 1.0]], dtype=torch.float64)
TEACHER = torch.tensor([[0.0, -0.5], [1.0, 3.0]], dtype=torch.float64)
FAKE = torch.tensor([[0.4, -0.9], [1.5, 2.0]], dtype=torch.float64)
GROUP = torch.tensor([[0.4, -0.2], [0.1, 0.3], [-0.2, 0.5], [1.0, -1.0]], dtype=torch.float64)
SIZES = torch.tensor([0.8, 1.0, 1.2, 2.0], dtype=torch.float64)


def close(found: Tensor, expected: object) -> None:
    np.testing.assert_allclose(found.detach().numpy(), np.array(expected), atol=6e-7)


def test_guidance_is_ho_and_salimans_and_splits_exactly() -> None:
    c, u, f = (torch.tensor([v], dtype=torch.float64) for v in ([0.9, 1.0], [0.6, 1.4], [0.4, 1.5]))
    close(guided(c, u, 7.0), [[2.7, -1.4]])
    close(guided(c, u, 1.0), [[0.9, 1.0]])
    dm, ca = split_direction(c, u, f, 7.0)
    close(dm, [[0.5, -0.5]])
    close(ca, [[1.8, -2.4]])
    close(dm + ca - (guided(c, u, 7.0) - f), [[0.0, 0.0]])


def test_loss_and_gradient_are_those_of_dmd() -> None:
    x = X.clone().requires_grad_()
    size = mean_size(x, TEACHER)
    close(size, [0.5, 1.5])
    step = normalised(TEACHER - FAKE, size)
    close(-step, [[0.8, -0.8], [1 / 3, -2 / 3]])
    loss = matching_loss(x, step).mean()
    close(loss, 0.2294444)
    loss.backward()
    assert x.grad is not None
    close(x.grad, [[0.2, -0.2], [1 / 12, -1 / 6]])
    mean = normalised(TEACHER - FAKE, size.detach(), group=2, axis="prompt", scale="group_mean")
    close(-mean, [[0.4, -0.4], [0.5, -1.0]])
    close(matching_loss(X, mean).mean(), 0.19625)


def test_nothing_but_x_carries_a_gradient() -> None:
    x, teacher, fake = (v.clone().requires_grad_() for v in (X, TEACHER, FAKE))
    matching_loss(x, normalised(teacher - fake, mean_size(x, teacher))).sum().backward()
    assert x.grad is not None and teacher.grad is None and fake.grad is None


def test_group_readings() -> None:
    per_sample = [[0.5, -0.25], [0.1, 0.3], [-1 / 6, 5 / 12], [0.5, -0.5]]
    close(normalised(GROUP, SIZES, 4, "prompt", "per_sample"), per_sample)
    close(normalised(GROUP, SIZES, 4, "prompt", "group_mean"), [[0.32, -0.16], [0.08, 0.24], [-0.16, 0.4], [0.8, -0.8]])
    close(normalised(GROUP, SIZES, 4, "prompt", "none"), GROUP.numpy())
    close(normalised(GROUP, SIZES, 4, "renoise", "group_mean"), [[0.26, -0.08]])
    close(normalised(GROUP, SIZES, 4, "renoise", "per_sample"), [np.mean(per_sample, axis=0)])


@pytest.mark.parametrize("scale", ["per_sample", "group_mean"])
@pytest.mark.parametrize("axis", ["prompt", "renoise"])
def test_a_group_of_one_is_dmd2_bit_for_bit(axis: Any, scale: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    x, teacher, fake = (torch.randn(6, 3, 4, 4, generator=generator) for _ in range(3))
    size = mean_size(x, teacher)
    assert torch.equal(normalised(teacher - fake, size, 1, axis, scale), normalised(teacher - fake, size))
    # and DMD2's own expression, whose sign is the other
    theirs = (fake - teacher) / (x - teacher).abs().mean(dim=[1, 2, 3], keepdim=True)
    torch.testing.assert_close(normalised(teacher - fake, size), -theirs, rtol=1e-6, atol=0)


def test_scale_and_order_of_a_group_do_not_matter() -> None:
    scales: tuple[Scale, ...] = ("per_sample", "group_mean")
    for scale in scales:
        plain = normalised(GROUP, SIZES, 4, "prompt", scale)
        close(normalised(7 * GROUP, 7 * SIZES, 4, "prompt", scale), plain.numpy())
        order = torch.tensor([2, 0, 3, 1])
        close(normalised(GROUP[order], SIZES[order], 4, "prompt", scale), plain[order].numpy())
    twice = normalised(torch.cat([GROUP, 9 * GROUP]), torch.cat([SIZES, SIZES]), 4, "prompt", "group_mean")
    close(twice[:4], normalised(GROUP, SIZES, 4, "prompt", "group_mean").numpy())  # never over prompts


def test_equal_images_have_no_direction_and_broken_groups_are_refused() -> None:
    zeros = torch.zeros(2, 3)
    assert torch.equal(normalised(zeros, torch.zeros(2)), zeros)
    with pytest.raises(ValueError, match="whole groups"):
        normalised(GROUP, SIZES, 3, "prompt")
    with pytest.raises(ValueError, match="whole groups"):
        normalised(GROUP, SIZES, 4, "none")


def test_expected_gradient_is_that_of_the_divergence() -> None:
    """Teacher N(2, 1), student a + b z, s = 0.6, by Gauss-Hermite quadrature: dKL/da, dKL/db of the noised densities."""
    s, b, mean = 0.6, 0.5, 2.0
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    z, e = (torch.tensor(v.ravel()) for v in np.meshgrid(nodes, nodes, indexing="ij"))
    weight = torch.tensor(np.outer(weights, weights).ravel() / weights.sum() ** 2)
    a_, b_ = torch.tensor(0.0, dtype=torch.float64, requires_grad=True), torch.tensor(b, requires_grad=True).double()
    b_.retain_grad()
    x = a_ + b_ * z
    noisy = ((1 - s) * x + s * e).detach()
    var_r, var_f = (1 - s) ** 2 + s**2, ((1 - s) * b) ** 2 + s**2
    teacher = (noisy + s**2 * -(noisy - (1 - s) * mean) / var_r) / (1 - s)
    fake = (noisy + s**2 * -noisy / var_f) / (1 - s)
    step = (1 - s) ** 2 / s**2 * (teacher - fake)
    # summed with quadrature weights; one element an image
    (weight * matching_loss(x[:, None], step[:, None])).sum().backward()
    assert a_.grad is not None and b_.grad is not None
    close(a_.grad, -0.6153846)
    close(b_.grad, -0.0461538)


def teacher_x0(noisy: np.ndarray, s: float) -> np.ndarray:
    """Exact x0 of 0.7 N(-1, .3) + 0.3 N(2, .5), elementwise."""
    w, m, sd = np.array([0.7, 0.3]), np.array([-1.0, 2.0]), np.array([0.3, 0.5])
    mean, var = (1 - s) * m[:, None, None], ((1 - s) * sd[:, None, None]) ** 2 + s**2
    log = np.log(w)[:, None, None] - 0.5 * (noisy - mean) ** 2 / var - 0.5 * np.log(var)
    p = np.exp(log - log.max(0))
    score = (p / p.sum(0) * -(noisy - mean) / var).sum(0)
    return (noisy + s**2 * score) / (1 - s)


def toy_student(mode: str, steps: int = 600, group: int = 8, elements: int = 64) -> float:
    """Where the mean of a student a + b z ends that starts at 0.5 and learns from the exact teacher."""
    rng = np.random.default_rng(1)
    a, b = 0.5, 1.0
    for _ in range(steps):
        z, e = rng.standard_normal((group, elements)), rng.standard_normal((group, elements))
        s = float(rng.uniform(0.02, 0.98))
        x = a + b * z
        noisy = (1 - s) * x + s * e
        teacher = teacher_x0(noisy, s)
        fake = (noisy - s**2 * (noisy - (1 - s) * a) / (((1 - s) * b) ** 2 + s**2)) / (1 - s)
        direction = torch.from_numpy(teacher - fake)
        if mode == "centred":
            direction = direction - direction.mean(dim=0)
        size = mean_size(torch.from_numpy(x), torch.from_numpy(teacher))
        scale: Scale = "per_sample" if mode == "per_sample" else "group_mean"
        step = normalised(direction, size, group, "prompt", scale).numpy()
        a, b = a + 0.02 * step.mean(), max(b + 0.02 * float((step * z).mean()), 0.05)
    return a


def test_a_centred_direction_never_moves_the_mean() -> None:
    assert toy_student("centred") == pytest.approx(0.5, abs=1e-9)
    assert toy_student("per_sample") == pytest.approx(-0.064, abs=0.06)
    assert toy_student("group_mean") == pytest.approx(-0.066, abs=0.06)


def test_flow_conversions_of_a_direction() -> None:
    """mu_R - mu_F = -s (v_R - v_F), and its relation to the scores."""
    s, x0, e = 0.75, np.array([0.5, -1.0]), np.array([1.0, 0.25])
    noisy = (1 - s) * x0 + s * e
    v_r, v_f = np.array([0.9, 1.0]), np.array([0.4, 1.5])
    from diffalign.pipelines.process import Flow

    process, t = Flow(), torch.tensor([s])
    mu = [process.x0(torch.tensor(noisy)[None], torch.tensor(v)[None], t) for v in (v_r, v_f)]
    np.testing.assert_allclose(noisy, [0.875, -0.0625])
    np.testing.assert_allclose((mu[0] - mu[1]).numpy()[0], [-0.375, 0.375], atol=1e-6)
    np.testing.assert_allclose((1 - s) / s**2 * (mu[0] - mu[1]).numpy()[0], [-1 / 6, 1 / 6], atol=1e-6)
    assert math.isclose((1 - s) ** 2 / s**2 * -0.375, -0.0416667, abs_tol=1e-6)
