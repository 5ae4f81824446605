"""Advantages, R_dm as a number, and the few-step sampler as a policy, against numpy and quadrature."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from diffalign.objectives.advantages import (
    Baseline,
    by_spread,
    ca_factor,
    combined,
    exponential_weights,
    gradient_balance,
    inverse_spread,
    standardised,
)
from diffalign.objectives.density_ratio import flow_weight, ratio_terms, with_error
from diffalign.objectives.few_step_policy import Reduction, log_probability, ppo_loss

R = torch.tensor([[1.0, 2.0, 3.0, 6.0]], dtype=torch.float64)
Q = torch.tensor([[0.20, 0.24, 0.22, 0.30]], dtype=torch.float64)


def close(found: Tensor, expected: object, atol: float = 6e-7) -> None:
    np.testing.assert_allclose(found.detach().numpy(), np.array(expected), atol=atol)


def test_standardised_within_a_prompt() -> None:
    close(standardised(R), [[-1.068988, -0.534494, 0.0, 1.603482]])
    close(standardised(R, sample_std=True), [[-0.925777, -0.462889, 0.0, 1.388666]])
    two = torch.tensor([[1.0, 2, 3, 6], [10, 10.1, 10.2, 10.3]], dtype=torch.float64)
    close(standardised(two)[1], [-1.340442, -0.446814, 0.446814, 1.340442])
    close(standardised(two, spread="batch")[1], [-0.039341, -0.013114, 0.013114, 0.039341])


def test_leave_one_out_is_the_mean_of_the_others() -> None:
    expected = [v - np.mean([w for w in (1, 2, 3, 6) if w != v]) for v in (1, 2, 3, 6)]
    close(standardised(R, baseline="leave_one_out", spread="none"), [expected])
    close(standardised(R, baseline="leave_one_out"), [np.array(expected) / (1.870829 + 1e-4)], atol=1e-6)


def test_groups_without_variance_and_unknown_rewards() -> None:
    flat = torch.tensor([[0.3, 0.3, 0.3], [0.1, 0.1 + 1e-9, 0.1]])
    assert torch.equal(standardised(flat), torch.zeros(2, 3))
    gap = torch.tensor([[1.0, float("nan"), 3.0], [float("nan")] * 3], dtype=torch.float64)
    found = standardised(gap)
    close(found, [[-1 / 1.0001, 0, 1 / 1.0001], [0, 0, 0]])
    close(combined({"r": torch.tensor([[0.0, 1e6, 0, 0] + [0.0] * 60])}, {"r": 1.0}).max(), 5.0)


def test_several_rewards_are_standardised_before_they_are_summed() -> None:
    close(standardised(R) + standardised(Q), [[-2.135183, -0.534494, -0.533098, 3.202775]])
    close(combined({"r": R, "q": Q}, {"r": 1.0, "q": 1.0}), [[-1.088607, -0.272508, -0.271796, 1.63291]])
    close(standardised(R + Q), [[-1.07046, -0.524735, -0.010495, 1.60569]])


def test_advantages_multiply_the_guidance_alone() -> None:
    dm, ca = np.array([0.5, -0.5]), np.array([1.8, -2.4])
    a = torch.tensor([1.603482, 0.0, -1.068988, -3.0], dtype=torch.float64)
    raw = [dm + f * ca for f in ca_factor(a, "raw").tolist()]
    np.testing.assert_allclose(raw[:3], [[3.386268, -4.348357], [0.5, -0.5], [-1.424178, 2.065571]], atol=1e-6)
    close(ca_factor(a, "factor", 0.5), [1.801741, 1.0, 0.465506, 0.0])
    close(ca_factor(a, "exponential"), [1.0] * 4)


def test_reward_weights() -> None:
    close(exponential_weights(R), [[1.151910, 1.326896, 1.528465, 2.336206]])
    narrow = torch.tensor([[0.27, 0.28, 0.29, 0.30], [1.0, 2.0, 3.0, 6.0], [0.0] * 4], dtype=torch.float64)
    close(exponential_weights(narrow)[0, [0, 3]], [1.605315, 1.692000])
    close(exponential_weights(narrow)[1:], [exponential_weights(R)[0].tolist(), [1.0] * 4])
    assert inverse_spread({"a": 0.1, "b": 0.4}) == pytest.approx({"a": 0.8, "b": 0.2})
    w = by_spread({"r": R, "q": Q}, {"r": 1.0, "q": 2.0})
    total = w["r"] * standardised(R) + w["q"] * standardised(Q)
    summed = (R + 2 * Q).numpy()
    expected = (summed - summed.mean()) / (R.numpy().std() + 2 * Q.numpy().std())
    close(total, expected, atol=5e-4)  # the identity of the paper, up to the epsilon of the standardisation
    assert float(by_spread({"r": 0 * R}, {"r": 1.0})["r"]) == 0.0
    close(
        gradient_balance(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[0.5], [1.0]])), [10.0, 0.0], atol=1e-5
    )


def test_centred_scalar_rewards_are_unbiased_only_left_out() -> None:
    """Policy N(0, .5^2), R the log ratio to N(2, 1), exact gradient 2: the group's mean shrinks it by 1 - 1/G."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(0.5 * rng.standard_normal((200_000, 4)))
    reward = -0.5 * (x - 2) ** 2 + 0.5 * (x / 0.5) ** 2 + math.log(0.5)
    score = x / 0.25
    baselines: tuple[Baseline, ...] = ("mean", "leave_one_out")
    means = {b: float((standardised(reward, b, "none") * score).mean()) for b in baselines}
    assert means["mean"] == pytest.approx(1.5, abs=0.02)
    assert means["leave_one_out"] == pytest.approx(2.0, abs=0.02)


def gaussian_velocity(noisy: Tensor, s: Tensor, mean: float, std: float) -> Tensor:
    """The exact velocity for data N(mean, std^2): e_hat - x0_hat."""
    variance = ((1 - s) * std) ** 2 + s**2
    e_hat = s * (noisy - (1 - s) * mean) / variance
    return (e_hat - noisy) / (1 - s)  # v = e - x0 and noisy = (1 - s) x0 + s e


def test_the_log_ratio_is_a_difference_of_denoising_losses() -> None:
    """Integrated over all noise levels: log N(x; 2, 1) / N(x; 0, .5^2), with velocity errors and their weights."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(48)
    e, w = torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())
    snr = torch.linspace(-24, 24, 4001, dtype=torch.float64)
    for x, expected in ((-0.5, -3.318147), (0.3, -1.958147), (1.2, 1.866853)):
        s = (1 / (1 + (snr / 2).exp()))[:, None]
        noisy = (1 - s) * x + s * e
        velocity = [gaussian_velocity(noisy, s, m, d) for m, d in ((0.0, 0.5), (2.0, 1.0))]
        terms = [
            ratio_terms(f[:, None], r[:, None], (e - x)[:, None], flow_weight(t.expand_as(e)))
            for f, r, t in zip(*velocity, s, strict=True)
        ]
        over_noise = torch.stack(terms) @ w
        ds_dsnr = (s[:, 0] * (1 - s[:, 0]) / 2).abs()
        assert float(torch.trapezoid(over_noise * ds_dsnr, snr)) == pytest.approx(expected, abs=2e-5)


def test_weights_and_one_draw() -> None:
    s = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    close(flow_weight(s, "epsilon"), [5.333333, 4, 5.333333])
    close(flow_weight(s), [3, 1, 1 / 3])
    close(flow_weight(s, "x0"), [48, 4, 0.592593])
    fake, teacher, target = (torch.tensor([v], dtype=torch.float64) for v in ([0.7, -0.9], [0.9, -1.1], [1.0, -1.0]))
    close(ratio_terms(fake, teacher, target, flow_weight(s[2:])), [0.0266667])
    mean, error = with_error(torch.tensor([[1.0], [3.0], [5.0]]))
    assert float(mean) == 3.0 and float(error) == pytest.approx(2 / math.sqrt(3))
    assert with_error(torch.tensor([[1.0]]))[1].isnan().all()


def test_importance_ratio_of_a_transition() -> None:
    old = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    new = old + torch.tensor([[0.02, -0.01, 0.0, 0.03]])
    rho = torch.tensor([0.75], dtype=torch.float64)
    action = old + 0.75 * torch.tensor([[1.0, -1.0, 0.5, 2.0]])
    reductions: tuple[Reduction, ...] = ("sum", "mean", "simple")
    logs = {r: [log_probability(action, m, rho, r) for m in (new, old)] for r in reductions}
    close(logs["sum"][0] - logs["sum"][1], [0.1187556])
    for reduction, expected in zip(reductions, (1.1260946, 1.0301340, 1.0339640), strict=True):
        _, found = ppo_loss(*logs[reduction], torch.tensor([1.0]), 0.2, 0.2)
        close(found, [expected])
    loss, ratio = ppo_loss(logs["mean"][0], logs["mean"][1], torch.tensor([1.0]), 1e-5, 1e-5)
    close(loss, [-(1 + 1e-5)])
    loss, _ = ppo_loss(logs["mean"][0], logs["mean"][1], torch.tensor([-1.0]), 1e-5, 1e-5)
    close(loss, ratio.numpy())  # the unclipped one is worse for a negative advantage


def test_summed_log_ratios_explode_with_the_dimension() -> None:
    rng = np.random.default_rng(0)
    old = torch.zeros(400, 65536)
    action = torch.from_numpy(0.75 * rng.standard_normal((400, 65536), dtype=np.float32))
    rho = torch.full((400,), 0.75)
    total = log_probability(action, old + 0.01, rho, "sum") - log_probability(action, old, rho, "sum")
    mean = log_probability(action, old + 0.01, rho) - log_probability(action, old, rho)
    assert float(total.std()) == pytest.approx(3.4133, rel=0.1)
    assert float(mean.std()) == pytest.approx(5.2e-5, rel=0.1)
