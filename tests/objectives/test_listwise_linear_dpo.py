"""The listwise loss, Linear-DPO, and the options of Diffusion-DPO that come from papers, against numpy."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from diffalign.objectives import GDRO, DiffusionDPO, GroupErrors, LinearDPO, Listwise
from helpers.objective_oracles import random_group

ERRORS, REFERENCE, LABELS = [0.50, 0.42, 0.61, 0.47], [0.48, 0.45, 0.58, 0.47], [0.9, 0.4, 0.4, 0.1]


def group_of(errors: Any, reference: Any, labels: Any, order: Any = None) -> GroupErrors:
    fields = [torch.tensor([row], dtype=torch.float64) for row in (errors, reference, labels)]
    return GroupErrors(
        fields[0].requires_grad_(), fields[1], fields[2], order=None if order is None else torch.tensor([order])
    )


def solve(objective: Any, group: GroupErrors) -> tuple[float, list[float]]:
    loss = objective(group).loss
    (slope,) = torch.autograd.grad(loss.sum(), group.policy_error)
    return loss.item(), slope[0].tolist()


# --- listwise --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("over", "loss", "slope"),
    [
        ("all", 1.87623647, [6.02541733, -2.32890989, -0.78692646, -2.90958098]),
        ("remaining", 1.65747470, [6.84689444, -1.85495820, -1.20666118, -3.78527506]),
    ],
)
def test_listwise_vectors(over: Any, loss: float, slope: list[float]) -> None:
    """The vectors rank equal labels by position, so the first of the two is raised by next to nothing."""
    group = group_of(ERRORS, REFERENCE, [0.9, 0.4 + 1e-13, 0.4, 0.1])
    found = solve(Listwise(10.0, over), group)
    assert found[0] == pytest.approx(loss, abs=6e-9) and found[1] == pytest.approx(slope, abs=6e-9)
    rows = (ERRORS, REFERENCE, [0.9, 0.4 + 1e-7, 0.4, 0.1])
    single = Listwise(10.0, over)(GroupErrors(*(torch.tensor([row]) for row in rows)))
    assert single.loss.item() == pytest.approx(loss, rel=1e-5)


def oracle(d: np.ndarray, labels: np.ndarray, order: tuple[int, ...], over: str) -> float:
    total = 0.0
    for place, i in enumerate(order):
        rivals = order if over == "all" else order[place:]
        s = -10.0 * d
        weight = (2 ** labels[i] - 1) / math.log2(2 + place)
        total += weight * (np.log(np.exp(s[list(rivals)]).sum()) - s[i])
    return total


@pytest.mark.parametrize("over", ["all", "remaining"])
def test_listwise_on_random_groups_with_ties(over: Any) -> None:
    """`all`: the mean over orders of the ties. `remaining`: the order that was drawn."""
    for seed in range(12):
        group = random_group(seed, groups=1, k=4, steps=3)
        d = group.error_difference[0].detach().numpy()
        labels = group.labels[0].numpy()
        assert group.order is not None
        drawn = group.order[0].tolist()
        orders = [
            o for o in itertools.permutations(range(4)) if all(labels[o[i]] >= labels[o[i + 1]] for i in range(3))
        ]
        if over == "remaining":
            place = dict(enumerate(drawn))
            orders = [tuple(sorted(range(4), key=lambda i: (-labels[i], place[i])))]
        wanted = np.mean([oracle(d, labels, order, over) for order in orders])
        assert Listwise(10.0, over)(group).loss.item() == pytest.approx(wanted, rel=1e-9)


def test_listwise_over_the_remaining_without_weights_is_gdro_of_ranks() -> None:
    group = random_group(5)
    mine = Listwise(3.0, "remaining", gain="none", discount="none")(group).loss
    torch.testing.assert_close(mine, GDRO(3.0, 0.0, 0.0)(group).loss, rtol=1e-12, atol=0)


def test_listwise_of_one_winner_is_a_softmax_dpo() -> None:
    group = group_of([0.5, 0.42], [0.48, 0.45], [1.0, 0.0])
    wanted = solve(DiffusionDPO(20.0), group)
    for over in ("all", "remaining"):
        found = solve(Listwise(10.0, over, discount="none"), group)  # type: ignore[arg-type]
        assert found[0] == pytest.approx(wanted[0]) and found[1] == pytest.approx(wanted[1])
    assert solve(Listwise(10.0), group_of([0.5], [0.4], [0.9]))[0] == pytest.approx(0.0)


@pytest.mark.parametrize("over", ["all", "remaining"])
def test_listwise_gradients_by_finite_differences(over: Any) -> None:
    group = random_group(7, groups=2, k=4, steps=2)
    assert torch.autograd.gradcheck(
        lambda e: Listwise(2.0, over)(GroupErrors(e, group.reference_error, group.rewards, order=group.order)).loss,
        group.policy_error,
    )


# --- Linear-DPO ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [100.0, 500.0])
@pytest.mark.parametrize("floor", [0.0, 1e-3])
def test_linear_dpo_of_the_released_code(beta: float, floor: float) -> None:
    rng = np.random.default_rng(6)
    for _ in range(20):
        policy, reference = rng.random((2, 2)) * 0.03
        model_diff, ref_diff = policy[0] - policy[1], reference[0] - reference[1]
        weight = np.clip(0.2 * beta * (model_diff - ref_diff) + 0.5, floor, 1 - floor)
        loss, slope = solve(LinearDPO(beta, floor=floor), group_of(list(policy), list(reference), [1.0, 0.0]))
        assert loss == pytest.approx(weight * model_diff, abs=1e-12)
        assert slope == pytest.approx([weight, -weight], abs=1e-12)


def test_linear_dpo_stops_pulling() -> None:
    start = solve(LinearDPO(500.0), group_of([0.1, 0.1], [0.1, 0.1], [1.0, 0.0]))
    done = solve(LinearDPO(500.0), group_of([0.09, 0.1], [0.1, 0.1], [1.0, 0.0]))
    assert start[1] == [0.5, -0.5] and done[1] == [0.0, 0.0]


# --- options of Diffusion-DPO ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gap", "scale", "loss"),
    [(0.0, 1.0, 0.67334717), (0.5, 1.0, 0.66359711), (2.0, 1.0, 0.63494610), (0.5, 0.5, 0.67825968)],
)
def test_strength_inside_vectors(gap: float, scale: float, loss: float) -> None:
    """DA-DPO's beta 0.1 and log-ratio 0.4: here beta / 2 times a difference of errors of 0.4."""
    group = group_of([0.1, 0.5], [0.1, 0.1], [gap, 0.0])
    found = solve(DiffusionDPO(0.2, strength="gap", strength_scale=scale), group)
    if gap:
        assert found[0] == pytest.approx(loss, abs=6e-9)
    else:  # which image wins a tie is no matter of the strength
        assert abs(found[1][0]) == pytest.approx(abs(solve(DiffusionDPO(0.2), group)[1][0]))


def test_offset_vectors() -> None:
    group = group_of([0.101, 0.1], [0.1, 0.1], [1.0, 0.0])
    assert solve(DiffusionDPO(1000.0, offset=0.5), group)[0] == pytest.approx(1.31326169, abs=6e-9)
    assert solve(DiffusionDPO(1000.0), group)[0] == pytest.approx(0.97407698, abs=6e-9)
    # The paper's terms: softplus(-beta (D - D_ref) + m), D the policy's log-ratio of winner and loser.
    for d, d_ref, beta, m, loss, slope in (
        (0.5, 0.1, 0.1, 0.375, 0.87461020, -0.05829755),
        (0.5, 0.1, 0.1, 0.0, 0.67334717, -0.04900013),
        (-1.0, 2.0, 0.1, 5.16666667, 5.47088306, -0.09957925),
    ):
        found = solve(DiffusionDPO(2 * beta, offset=m), group_of([-d, 0.0], [-d_ref, 0.0], [1.0, 0.0]))
        assert found[0] == pytest.approx(loss, abs=6e-9) and -found[1][0] == pytest.approx(slope, abs=6e-9)


def test_the_gradient_factor_is_that_of_the_offset_loss() -> None:
    group = group_of([0.101, 0.1], [0.1, 0.1], [1.0, 0.0])
    for offset in (0.0, 0.5):
        out = DiffusionDPO(1000.0, offset=offset)(group)
        (slope,) = torch.autograd.grad(out.loss.sum(), group.policy_error)
        assert slope[0, 0].item() == pytest.approx(500 * out.metrics["gradient_factor"].item())
