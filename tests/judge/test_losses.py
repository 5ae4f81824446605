"""Numbers of the Z-Reward objectives, worked out apart from this code, and what must hold for any numbers."""

import numpy as np
import pytest
import scipy.stats
import torch

from diffalign.judge import losses, metrics, policy

ONE = torch.tensor([-2, -1, 0, 1, 2, 3, 2, 1, 0], dtype=torch.float64)
PAIR = torch.tensor(
    [
        [[0, 0, 0, 0, 1, 2, 3, 2, 1], [0, 0, 0, 0, 0, 1, 2, 3, 2]],
        [[0, 1, 2, 3, 2, 1, 0, 0, 0], [0, 0, 1, 2, 3, 2, 1, 0, 0]],
    ],
    dtype=torch.float64,
)[None]
SCORES = torch.tensor([[4.0, 2.5]], dtype=torch.float64)
TEACHER = torch.tensor([[0.01, 0.02, 0.05, 0.10, 0.20, 0.30, 0.20, 0.09, 0.03]], dtype=torch.float64)


def close(value: torch.Tensor | float, expected: object, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(
        torch.as_tensor(value, dtype=torch.float64),
        torch.as_tensor(expected, dtype=torch.float64),
        rtol=0,
        atol=tolerance,
    )


def test_expected_score_and_its_gradient() -> None:
    logits = ONE.clone().requires_grad_()
    mu = losses.expected_score(logits.log_softmax(-1))
    close(mu.detach(), 3.474906283138779)
    mu.backward()
    close(
        logits.grad,
        [-0.0078251243, -0.0169735804, -0.0344576677, -0.0619125661, -0.0819819667, 0.0117752434, 0.0906457066,
         0.0650997779, 0.0356301774],
    )  # fmt: skip


def test_rewards_advantages_and_direct_losses_of_a_pair() -> None:
    log_q = PAIR.log_softmax(-1)
    mu = losses.expected_score(log_q)
    close(mu, [[[3.7968407049, 4.1426117489], [2.6015796475, 3.0]]])
    close(losses.pointwise_reward(mu, SCORES), [[[0.9492101762, 0.9643470628], [0.9746050881, 0.875]]])
    close(losses.gap_error(mu, SCORES), [[[0.3047389426, 0.7031592951], [0.0410321014, 0.3573882511]]])
    close(losses.pairwise_reward(mu, SCORES), [[[0.8740127203, 0.9501974559], [0.9567786195, 0.8674315567]]])
    rewards = losses.trace_reward(mu, SCORES, 1.0, 1.0)
    close(rewards, [[[1.8232228965, 1.9145445187], [1.9313837076, 1.7424315567]]])
    close(
        losses.group_advantages(rewards, 1e-6),
        [[[-0.9999780999, 0.9999780999], [0.9999894154, -0.9999894154]]],
    )
    close(losses.pointwise_loss(log_q, SCORES), [1.281099611910662])
    close(losses.pairwise_loss(log_q, SCORES), [0.08789491188537868])
    close(losses.bradley_terry(mu), [0.2705592263])
    close(losses.group_advantages(torch.tensor([0.9, 0.8, 0.7, 0.6], dtype=torch.float64), 1e-6),
          [1.3416287866, 0.4472095955, -0.4472095955, -1.3416287866])  # fmt: skip


def test_swapping_the_sides_swaps_rewards_and_keeps_losses() -> None:
    log_q, mu = PAIR.log_softmax(-1), losses.expected_score(PAIR.log_softmax(-1))
    swapped, back = losses.trace_reward(mu.flip(1), SCORES.flip(1), 1.0, 1.0), losses.trace_reward(mu, SCORES, 1.0, 1.0)
    close(swapped.flip(1), back)
    close(losses.pairwise_loss(log_q.flip(1), SCORES.flip(1)), losses.pairwise_loss(log_q, SCORES))


def test_equal_rewards_have_no_advantage() -> None:
    assert losses.group_advantages(torch.full((3, 2, 8), 0.1)).abs().max() == 0


def test_rewards_carry_no_gradient_and_the_pairwise_loss_reaches_both_sides() -> None:
    logits = PAIR.clone().requires_grad_()
    log_q = logits.log_softmax(-1)
    assert not losses.trace_reward(losses.expected_score(log_q), SCORES, 1.0, 1.0).requires_grad
    losses.pairwise_loss(log_q, SCORES).sum().backward()
    assert logits.grad is not None
    assert logits.grad[0, 0].abs().sum() > 0 and logits.grad[0, 1].abs().sum() > 0


def test_scores_between_levels_have_no_bin() -> None:
    assert losses.level_of(torch.tensor([1.0, 1.5, 5.0])).tolist() == [0, 1, 8]
    for bad in (4.25, 0.5, 5.5):
        with pytest.raises(ValueError, match="levels"):
            losses.level_of(torch.tensor([bad]))


def test_forward_kl_and_its_gradient() -> None:
    uniform = torch.zeros(1, 9, dtype=torch.float64, requires_grad=True)
    loss = losses.forward_kl(uniform.log_softmax(-1), TEACHER)
    close(loss.detach(), [0.3660084444])
    loss.sum().backward()
    assert uniform.grad is not None
    close(uniform.grad, 1 / 9 - TEACHER)
    close(losses.forward_kl(ONE.log_softmax(-1)[None], TEACHER), [0.0754020483])
    certain = torch.eye(9, dtype=torch.float64)[:1]
    close(losses.forward_kl(uniform.detach().log_softmax(-1), certain), [np.log(9)])


def test_half_precision_is_widened() -> None:
    assert losses.expected_score(ONE.to(torch.bfloat16).float().log_softmax(-1)).dtype == torch.float32
    assert losses.forward_kl(ONE.bfloat16().log_softmax(-1)[None], TEACHER.bfloat16()).dtype == torch.float32


def test_on_policy_distillation() -> None:
    teacher = torch.tensor([[-0.1, -2.0, -0.5]], dtype=torch.float64)
    old = torch.tensor([[-0.3, -0.9, -0.5]], dtype=torch.float64)
    close(policy.on_policy_distillation(old, old, teacher, torch.ones(1, 3)), [-0.31])


def test_first_and_later_updates_have_one_gradient_where_the_policy_has_not_changed() -> None:
    generator = torch.Generator().manual_seed(0)
    log_p = -torch.rand(4, 5, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 0]], dtype=torch.float64)
    advantages = torch.tensor([1.0, -1.0, 0.5, 0.0], dtype=torch.float64)
    for length in ("sum", "mean"):
        grads = []
        for old in (None, log_p):
            leaf = log_p.clone().requires_grad_()
            policy.policy_loss(leaf, advantages, mask, old, length=length).sum().backward()
            grads.append(leaf.grad)
        assert grads[0] is not None
        close(grads[0], grads[1])
        assert grads[0][1, 2:].abs().max() == 0  # what is masked is not learnt


def test_the_ratio_is_clipped_on_the_side_that_gains() -> None:
    old, mask = torch.zeros(2, 1, dtype=torch.float64), torch.ones(2, 1)
    leaf = torch.log(torch.tensor([[1.5], [1.5]], dtype=torch.float64)).requires_grad_()
    loss = policy.policy_loss(leaf, torch.tensor([1.0, -1.0]), mask, old, clip=0.2)
    close(loss.detach(), [-1.2, 1.5])
    loss.sum().backward()
    assert leaf.grad is not None
    close(leaf.grad, [[0.0], [1.5]])


def test_kl_estimate_is_zero_at_the_reference_and_right_in_the_mean() -> None:
    p, q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    ones = torch.ones(3, 1)
    estimate = policy.kl_to_reference(p.log()[:, None], q.log()[:, None], ones)
    close((p * estimate).sum(), (p * (p / q).log()).sum())
    assert policy.kl_to_reference(p.log()[:, None], p.log()[:, None], ones).abs().max() == 0


def test_metrics_of_four_images() -> None:
    mu, s = np.array([3.9, 3.1, 4.2, 2.0]), np.array([4, 3.5, 3.5, 2])
    assert metrics.preference_accuracy(mu, s, ["p"] * 4) == (0.8, 5)
    assert metrics.preference_accuracy(mu, s, ["p"] * 4, metrics.MARGIN) == (1.0, 3)
    assert metrics.plcc(mu, s) == pytest.approx(0.8808303293, abs=1e-9)
    assert metrics.srcc(mu, s) == pytest.approx(0.6324555320, abs=1e-9)


def test_preference_accuracy_counts_predicted_ties_as_wrong_and_keeps_prompts_apart() -> None:
    assert metrics.preference_accuracy(np.array([3, 3.0]), np.array([1, 2.0]), ["a", "a"]) == (0.0, 1)
    accuracy, pairs = metrics.preference_accuracy(np.array([1, 2.0]), np.array([1, 2.0]), ["a", "b"])
    assert np.isnan(accuracy) and pairs == 0


def test_correlations_against_scipy() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 9, 60) / 2, rng.integers(0, 9, 60) / 2 + rng.normal(size=60)
    assert metrics.plcc(a, b) == pytest.approx(scipy.stats.pearsonr(a, b).statistic, abs=1e-12)
    assert metrics.srcc(a, b) == pytest.approx(scipy.stats.spearmanr(a, b).statistic, abs=1e-12)
    assert np.isnan(metrics.plcc(np.ones(4), np.arange(4.0)))


def test_crps_is_the_integral_of_the_squared_difference_of_distribution_functions() -> None:
    rng = np.random.default_rng(1)
    q = rng.dirichlet(np.ones(9), size=5)
    y = np.array([1.0, 2.25, 3.5, 4.9, 5.0])
    grid = np.linspace(0.5, 5.5, 500_001)[:-1] + 5e-6
    for row, value, found in zip(q, y, metrics.crps(q, y), strict=True):
        below = np.cumsum(row)[np.clip(np.searchsorted(metrics.LEVELS, grid, side="right") - 1, 0, 8)]
        below = np.where(grid < 1, 0.0, below)
        assert found == pytest.approx(np.sum((below - (grid >= value)) ** 2) * 1e-5, abs=1e-4)
    assert metrics.crps(np.eye(9)[[3]], np.array([4.0])) == pytest.approx(1.5)


def test_crps_is_least_for_the_distribution_that_ratings_come_from() -> None:
    rng = np.random.default_rng(2)
    true = TEACHER.numpy()[0]
    ratings = rng.choice(metrics.LEVELS, size=4000, p=true)
    flat = np.full(9, 1 / 9)
    sharp = np.eye(9)[5]
    scores = [metrics.crps(np.tile(q, (4000, 1)), ratings).mean() for q in (true, flat, sharp)]
    assert scores[0] < scores[1] and scores[0] < scores[2]


def test_calibration_sees_bias_and_width() -> None:
    rng = np.random.default_rng(3)
    q = rng.dirichlet(np.full(9, 0.4), size=3000)
    y = np.array([rng.choice(metrics.LEVELS, p=row) for row in q])
    good = metrics.calibration(q, y)
    assert good.error < 0.1 and sum(good.counts) == 3000
    assert good.spread_expected == pytest.approx(good.spread_observed, rel=0.05)
    assert metrics.calibration(q, y - 0.5).error == pytest.approx(0.5, abs=0.1)
    certain = metrics.calibration(np.eye(9)[(q @ np.arange(9)).round().astype(int)], y)
    assert certain.spread_expected == 0 and certain.spread_observed > 0.5
