"""GDRO against numbers worked out by hand and against numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from diffalign.objectives import GDRO, DiffusionDPO, GroupErrors
from helpers.objective_oracles import (
    TOLERANCE,
    UNANIMOUS,
    gdro,
    group_of,
    implicit,
    log_sigmoid,
    loss_and_gradient,
    numpy_errors,
    random_group,
)


def test_gdro_vector_1_implicit_reward() -> None:
    noise, x0, t = np.array([0, 1, -0.5, 2.0]), np.array([1, -1, 0.5, 0.0]), 0.25
    assert ((1 - t) * x0 + t * noise).tolist() == [0.75, -0.5, 0.25, 0.5]
    target, policy, reference = noise - x0, np.array([-0.8, 1.7, -1.2, 1.5]), np.array([-0.5, 1.5, -0.8, 1.2])
    errors = [((target - p) ** 2).sum() for p in (policy, reference)]
    assert errors == pytest.approx([0.42, 1.18])
    delta = policy - reference
    assert 2 * ((target - reference) @ delta) - delta @ delta == pytest.approx(0.76)
    for beta, summed, mean in ((12.0, 9.12, 2.28), (6.0, 4.56, 1.14)):
        for scale, expected in ((1.0, summed), (0.25, mean)):
            # Beside an image on which nothing has changed, the margin is s itself.
            policy_error = torch.tensor([[errors[0] * scale, 0.3]], dtype=torch.float64)
            reference_error = torch.tensor([[errors[1] * scale, 0.3]], dtype=torch.float64)
            group = GroupErrors(policy_error, reference_error, torch.tensor([[1.0, 0.0]], dtype=torch.float64))
            assert GDRO(beta, 0.0, 0.0)(group).metrics["margin"].item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("tau", "loss", "gradient"),
    [
        (0.05, 1.958892, [-0.648293, -0.338385, 0.986678]),
        (0.5, 1.904324, [-0.254239, -0.300478, 0.554717]),
        (1e9, 1.825593, [0.018038, -0.171718, 0.153680]),
    ],
)
def test_gdro_vector_2_loss(tau: float, loss: float, gradient: list[float]) -> None:
    s, rewards = [0.2, -0.1, 0.3], [0.9, 0.5, 0.1]
    found, slope = implicit(s, rewards, tau)
    assert found == pytest.approx(loss, abs=1e-6) and slope == pytest.approx(gradient, abs=1e-6)
    oracle = gdro(s, rewards, tau)
    assert found == pytest.approx(oracle[0], rel=1e-9) and slope == pytest.approx(oracle[1].tolist(), abs=1e-9)


def test_gdro_vector_2_ranks_only() -> None:
    s, rewards = [0.2, -0.1, 0.3], [0.9, 0.5, 0.1]
    assert implicit(s, rewards, 0.0)[0] == pytest.approx(1.9589259, abs=1e-7)
    assert implicit(s, rewards, 0.025)[0] == pytest.approx(implicit(s, rewards, 0.0)[0], abs=2e-8)


def test_gdro_vector_3_two_images() -> None:
    loss, gradient = implicit([0.7, -0.4], [1.0, 0.0], 0.0)
    assert loss == pytest.approx(0.287335, abs=1e-6) and loss == pytest.approx(-log_sigmoid(1.1))
    loss, gradient = implicit([0.7, -0.4], [0.6, 0.5], 0.05)
    assert loss == pytest.approx(0.418459, abs=1e-6) and gradient == pytest.approx([-0.130537, 0.130537], abs=1e-6)


def test_gdro_vector_4_ties() -> None:
    s, rewards = [0.2, -0.1, 0.3, 0.0], [1.0, 1.0, 0.0, 0.0]
    loss, gradient = implicit(s, rewards, 0.05)
    assert loss == pytest.approx(3.433206, abs=1e-6)
    assert gradient == pytest.approx([-0.227128, -1.019842, 0.790755, 0.456215], abs=1e-6)
    assert implicit(s, rewards, 0.05, [1, 0, 2, 3])[0] == pytest.approx(3.226026, abs=1e-6)
    assert implicit(s, rewards, 0.0)[0] == pytest.approx(3.133206, abs=1e-6)
    assert implicit(s, rewards, 0.0, [1, 0, 2, 3])[0] == pytest.approx(3.226026, abs=1e-6)
    degenerate, slope = implicit(s, [1.0] * 4, 0.05)
    assert degenerate == pytest.approx(3.216539, abs=1e-6)
    assert slope == pytest.approx([0.022872, -0.103175, 0.207421, -0.127119], abs=1e-6)
    start, slope = implicit([0.0] * 4, [1.0] * 4, 0.05)
    assert start == pytest.approx(math.log(24)) and slope == pytest.approx([0.0] * 4, abs=1e-12)


def test_gdro_vectors_5_and_6_at_the_reference() -> None:
    _, gradient = implicit([0.0] * 6, [6.0, 5, 4, 3, 2, 1], 0.0)
    assert gradient == pytest.approx([-0.833333, -0.633333, -0.383333, -0.05, 0.45, 1.45], abs=1e-6)
    for successes, mass in ((1, 1.6667), (2, 2.9333), (3, 3.7), (4, 3.8), (5, 2.9)):
        _, gradient = implicit([0.0] * 6, [1.0] * successes + [0.0] * (6 - successes), 0.05)
        assert sum(map(abs, gradient)) == pytest.approx(mass, abs=5e-5)
    for rewards in ([0.0] * 6, [1.0] * 6):
        assert sum(map(abs, implicit([0.0] * 6, rewards, 0.05)[1])) == pytest.approx(0.0, abs=1e-12)


def test_gdro_vector_i_on_flow_errors() -> None:
    policy, reference = numpy_errors("flow")
    group = GroupErrors(policy, reference, torch.tensor([UNANIMOUS], dtype=torch.float64))
    assert GDRO(20.0, 0.5, 0.0)(group).loss.item() == pytest.approx(3.4937347590, rel=TOLERANCE)
    assert GDRO(20.0, 0.0, 0.0)(group).loss.item() == pytest.approx(1.4986711523, rel=TOLERANCE)


def test_gdro_of_two_without_extras_is_dpo_with_twice_the_beta() -> None:
    group = random_group(4, k=2)
    torch.testing.assert_close(GDRO(7.0, 0.0, 0.0)(group).loss, DiffusionDPO(14.0)(group).loss, rtol=1e-12, atol=0)


def test_gdro_adds_the_error_of_the_best_image() -> None:
    group = group_of([0.1, -0.2, 0.05], [0.2, 0.1, 0.9])
    plain, with_pull = (loss_and_gradient(GDRO(5.0, 0.05, g), group) for g in (0.0, 0.5))
    assert with_pull[0] - plain[0] == pytest.approx(0.5 * 0.30)
    assert [b - a for a, b in zip(plain[1], with_pull[1], strict=True)] == pytest.approx([0.0, 0.0, 0.5])


def test_gdro_reports_the_spread_to_set_beta_by() -> None:
    group = group_of([0.1, -0.2, 0.05], [0.2, 0.1, 0.9])
    assert GDRO(5.0)(group).metrics["implicit_spread"].item() == pytest.approx(5 * np.std([0.1, -0.2, 0.05]))
