"""Objectives against numbers computed in numpy from the papers' equations, and against their invariants."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffalign.objectives import (
    OBJECTIVES,
    SFT,
    DiffusionDPO,
    GroupErrors,
    Objective,
    ObjectiveOutput,
    SmPO,
    check_labels,
    has_preference,
    ranking,
)

# Two pairs: winner and loser errors of policy and reference, and what -log sigmoid(-beta/2 (d_w - d_l)) gives for them.
POLICY = [[0.1000, 0.1200], [0.2300, 0.2100]]
REFERENCE = [[0.1010, 0.1195], [0.2296, 0.2101]]


def pairs(dtype: torch.dtype = torch.float64) -> GroupErrors:
    policy = torch.tensor(POLICY, dtype=dtype, requires_grad=True)
    rewards = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=dtype)
    return GroupErrors(policy, torch.tensor(REFERENCE, dtype=dtype), rewards)


def run(group: GroupErrors, beta: float = 5000.0) -> ObjectiveOutput:
    return DiffusionDPO(beta)(group)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
def test_dpo_vector(dtype: torch.dtype, tolerance: float) -> None:
    group = pairs(dtype)
    out = run(group)
    assert out.loss.dtype == dtype
    assert out.metrics["margin"].tolist() == pytest.approx([3.75, -1.25], rel=max(tolerance, 1e-9) * 10)
    assert out.loss.tolist() == pytest.approx([0.0232454644, 1.5019290813], rel=tolerance * 10)
    assert out.loss.mean().item() == pytest.approx(0.7625872729, rel=tolerance)
    assert out.metrics["accuracy"].mean().item() == 0.5
    (gradient,) = torch.autograd.grad(out.loss.mean(), group.policy_error)
    assert gradient[:, 0].tolist() == pytest.approx([28.7217123875, 971.6248264684], rel=tolerance * 10)
    assert gradient[:, 1].tolist() == pytest.approx((-gradient[:, 0]).tolist())


@pytest.mark.parametrize(("beta", "loss"), [(2000.0, 0.5877451311), (500.0, 0.6403611497), (10_000.0, 1.2897213328)])
def test_dpo_other_betas(beta: float, loss: float) -> None:
    assert run(pairs(), beta).loss.mean().item() == pytest.approx(loss, rel=1e-6)


def test_dpo_is_not_the_logsigmoid_of_the_mean() -> None:
    """The published slip takes the mean inside and gets 0.2519."""
    assert run(pairs()).loss.mean().item() != pytest.approx(0.2519290814, rel=1e-2)


def numpy_errors(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean errors of toy policies on four images of eight elements: epsilon prediction, or velocity at t = 0.3."""
    j = np.arange(8)
    x = np.array([np.sin(0.7 * i + 0.3 * j) for i in range(4)])
    noise = np.tile(np.cos(0.5 * j), (4, 1))
    if kind == "independent":
        noise = np.array([np.cos(0.5 * j + 0.2 * i) for i in range(4)])
    if kind == "flow":
        x_t, target = 0.7 * x + 0.3 * noise, noise - x
        policy, reference = 0.9 * x_t - 0.1, 0.8 * x_t
    else:
        x_t, target = 0.8 * x + 0.6 * noise, noise
        policy, reference = 0.55 * x_t + 0.02, 0.5 * x_t
    return ((target - policy) ** 2).mean(1), ((target - reference) ** 2).mean(1)


@pytest.mark.parametrize(
    ("kind", "loss"), [("shared", 0.9206312662), ("independent", 0.8396374974), ("flow", 0.1705907973)]
)
def test_dpo_end_to_end_vectors(kind: str, loss: float) -> None:
    policy, reference = (torch.from_numpy(e)[None] for e in numpy_errors(kind))
    rewards = torch.tensor([[1.0, 2 / 3, 1 / 3, 0.0]], dtype=torch.float64)
    assert run(GroupErrors(policy, reference, rewards), 20.0).loss.item() == pytest.approx(loss, rel=1e-6)


def test_flow_dpo_in_epsilon_space_is_another_loss() -> None:
    policy, reference = (torch.from_numpy(e)[None] * 0.49 for e in numpy_errors("flow"))  # (1 - t)^2
    rewards = torch.tensor([[1.0, 2 / 3, 1 / 3, 0.0]], dtype=torch.float64)
    assert run(GroupErrors(policy, reference, rewards), 20.0).loss.item() == pytest.approx(0.3636695879, rel=1e-6)


def test_dpo_at_the_reference() -> None:
    reference = torch.tensor(REFERENCE, dtype=torch.float64)
    policy = reference.clone().requires_grad_()
    out = run(GroupErrors(policy, reference, torch.tensor([[1.0, 0.0], [0.0, 1.0]])))
    assert out.loss.tolist() == [math.log(2)] * 2
    assert out.metrics["margin"].tolist() == [0.0, 0.0] and out.metrics["accuracy"].tolist() == [0.5, 0.5]
    (gradient,) = torch.autograd.grad(out.loss.sum(), policy)
    assert gradient.tolist() == [[1250.0, -1250.0], [-1250.0, 1250.0]]


def test_dpo_ignores_a_common_shift_and_the_order_of_images() -> None:
    generator = torch.Generator().manual_seed(0)
    policy, reference, rewards = (torch.rand(6, 5, generator=generator, dtype=torch.float64) for _ in range(3))
    plain = run(GroupErrors(policy, reference, rewards), 3.0).loss
    shift = torch.rand(6, 1, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(run(GroupErrors(policy + shift, reference, rewards), 3.0).loss, plain)
    turn = torch.randperm(5, generator=generator)
    assert torch.equal(run(GroupErrors(policy[:, turn], reference[:, turn], rewards[:, turn]), 3.0).loss, plain)


def test_ties_follow_the_order_and_nothing_else() -> None:
    rewards = torch.tensor([[0.5, 0.9, 0.9, 0.1]])
    first = ranking(GroupErrors(rewards, rewards=rewards, order=torch.tensor([[0, 1, 2, 3]])))
    second = ranking(GroupErrors(rewards, rewards=rewards, order=torch.tensor([[3, 2, 1, 0]])))
    assert first.tolist() == [[1, 2, 0, 3]] and second.tolist() == [[2, 1, 0, 3]]


def test_sft_is_the_error_of_the_best_image() -> None:
    policy = torch.tensor([[0.3, 0.2, 0.7]], requires_grad=True)
    out = SFT()(GroupErrors(policy, rewards=torch.tensor([[0.1, 0.0, 0.9]])))
    assert out.loss.item() == pytest.approx(0.7)
    out.loss.sum().backward()
    assert policy.grad is not None and policy.grad.tolist() == [[0.0, 0.0, 1.0]]


def test_has_preference() -> None:
    rewards = torch.tensor([[0.2, 0.2], [0.1, 0.2], [float("nan"), 0.2], [0.1, 0.2]])
    mask = torch.tensor([True, True, True, False])
    assert has_preference(rewards, mask).tolist() == [False, True, False, False]


def test_labels_are_checked_by_kind() -> None:
    assert check_labels(torch.tensor([[0.0, 1.0]]), "vote_share") is None
    assert "reach from" in str(check_labels(torch.tensor([[0.0, 1.2]]), "vote_share"))
    assert check_labels(torch.tensor([[-3.0, 12.0]]), "score") is None


def test_missing_inputs_are_named() -> None:
    errors: Tensor = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="reference_error is missing"):
        DiffusionDPO(1.0)(GroupErrors(errors, rewards=errors))
    with pytest.raises(ValueError, match="rewards are missing"):
        SFT()(GroupErrors(errors))


def mixed_groups(rows: slice = slice(None)) -> GroupErrors:
    """Four groups of three images with everything that any objective asks for."""
    generator = torch.Generator().manual_seed(1)
    policy, reference, rewards = (torch.rand(4, 3, generator=generator, dtype=torch.float64)[rows] for _ in range(3))
    gap = policy.square()
    roles = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64).expand(4, 3)[rows]
    return GroupErrors(policy, reference, rewards, prediction_gap=gap, role=roles, anchor_gap=gap)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_do_not_mix_groups(name: str) -> None:
    objective: Any = OBJECTIVES[name]()
    whole = objective(mixed_groups()).loss
    alone = torch.cat([objective(mixed_groups(slice(i, i + 1))).loss for i in range(4)])
    assert whole.shape == (4,) and torch.equal(whole, alone)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_is_what_it_states(name: str) -> None:
    kind: Any = OBJECTIVES[name]
    assert issubclass(kind, Objective)
    assert kind.__dataclass_params__.frozen
    assert kind.title
    for one in dataclasses.fields(kind):
        assert one.metadata["description"], one.name
    group = mixed_groups()
    metrics = kind()(group).metrics
    assert set(kind.charts) <= set(metrics), "a title of a metric that is not logged"
    bare = GroupErrors(
        group.policy_error,
        group.reference_error if kind.needs_reference else None,
        group.rewards,
        prediction_gap=group.prediction_gap if kind.needs_gap else None,
        role=group.role if kind.label_kind == "role" else None,
        anchor_gap=group.anchor_gap if kind().needs_anchor_gap else None,
    )
    torch.testing.assert_close(kind()(bare).loss, kind()(group).loss, rtol=0, atol=0)
    if kind.single_margin:
        twice = kind(beta=2 * kind().beta)(group).metrics["margin"]
        torch.testing.assert_close(twice, 2 * metrics["margin"])


def test_bounds_of_scores_are_checked_where_they_are_set() -> None:
    with pytest.raises(ValueError, match="reward_max should be above reward_min=0.5, not 0.5"):
        SmPO(reward_min=0.5, reward_max=0.5)
    assert SmPO().unit_labels
    assert not SmPO(reward_min=-1.0).unit_labels
    assert not DiffusionDPO().unit_labels
