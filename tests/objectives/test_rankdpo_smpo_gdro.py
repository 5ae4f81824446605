"""RankDPO, SmPO and GDRO: numbers worked out in numpy from the papers' equations, and what must hold for any numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffalign.objectives import GDRO, DiffusionDPO, GroupErrors, RankDPO, SmPO, check_labels
from diffalign.rewards.aggregate import vote_shares
from helpers.objective_oracles import (
    TOLERANCE,
    UNANIMOUS,
    S,
    gdro,
    group_of,
    implicit,
    loss_and_gradient,
    numpy_errors,
    random_group,
    rankdpo,
)

SCORES = np.array([
    [0.281, 0.263, 0.274, 0.290],
    [11.2, 10.1, 10.1, 12.4],
    [21.9, 21.4, 22.0, 22.6],
    [0.81, 0.88, 0.74, 0.69],
    [0.35, -0.10, 0.62, 1.05],
])  # fmt: skip


PHI = [0.5333333333333333, 0.2, 0.4, 0.8]


POLICY, REFERENCE = np.array([0.1012, 0.1105, 0.0987, 0.0951]), np.array([0.1010, 0.1108, 0.0990, 0.0955])


def test_vote_shares_of_five_rewards() -> None:
    shares = vote_shares(SCORES)
    assert (shares * 15).round(9).tolist() == [8, 3, 6, 12] and shares.tolist() == pytest.approx(PHI)
    scaled = SCORES.copy()
    scaled[1], scaled[4] = np.exp(scaled[1]), scaled[4] ** 3
    assert vote_shares(scaled).tolist() == shares.tolist()  # an increasing transform of a reward changes nothing


def four(beta: float = 5000.0, **options: Any) -> tuple[float, list[float], dict[str, Tensor]]:
    policy = torch.from_numpy(POLICY)[None].requires_grad_()
    group = GroupErrors(policy, torch.from_numpy(REFERENCE)[None], torch.tensor([PHI], dtype=torch.float64))
    loss, gradient = loss_and_gradient(RankDPO(beta, **options), group)
    return loss, gradient, RankDPO(beta, **options)(group).metrics


def test_rankdpo_vector_c() -> None:
    loss, gradient, metrics = four()
    assert loss == pytest.approx(0.6789786442, rel=TOLERANCE)
    assert gradient == pytest.approx([472.9873625, -1359.7939296, -642.8833827, 1529.6899498], rel=TOLERANCE)
    assert metrics["weight_sum"].item() == pytest.approx(1.0746182919, rel=TOLERANCE)
    oracle, by_hand, total = rankdpo(POLICY - REFERENCE, PHI, 5000.0, [2, 4, 3, 1])
    assert loss == pytest.approx(oracle, rel=1e-9) and gradient == pytest.approx(by_hand.tolist(), rel=1e-9)
    assert metrics["weight_sum"].item() == pytest.approx(total, rel=1e-9)


def test_rankdpo_vector_c_variants() -> None:
    half, gradient, _ = four(2500.0)
    assert half == pytest.approx(0.6645431125, rel=TOLERANCE)
    assert gradient == pytest.approx([143.1658527, -721.5615269, -358.4146443, 936.8103185], rel=TOLERANCE)
    assert four(ranked_by="model")[0] == pytest.approx(0.5152940976, rel=TOLERANCE)
    assert four(pair_weight="gain")[0] == pytest.approx(1.7128485925, rel=TOLERANCE)
    assert four(pair_weight="none")[0] == pytest.approx(6.8476679691, rel=TOLERANCE)
    flipped = GroupErrors(*(torch.from_numpy(e)[None] for e in (REFERENCE, POLICY)), torch.tensor([PHI]).double())
    assert RankDPO(5000.0)(flipped).loss.item() == pytest.approx(1.2677030887, rel=TOLERANCE)  # the wrong sign of s


@pytest.mark.parametrize(
    ("objective", "loss"),
    [
        (RankDPO(5000.0), 0.3694617660),
        (RankDPO(2500.0), 0.5973621393),
        (RankDPO(5000.0, ranked_by="model"), 0.3009330447),
    ],
)
def test_rankdpo_vector_d(objective: RankDPO, loss: float) -> None:
    assert loss_and_gradient(objective, group_of(S, UNANIMOUS))[0] == pytest.approx(loss, rel=TOLERANCE)


def test_rankdpo_vector_d_gradient_and_reference() -> None:
    _, gradient = loss_and_gradient(RankDPO(5000.0), group_of(S, UNANIMOUS))
    assert gradient == pytest.approx([921.5835948, 397.7423776, -960.8862712, -358.4397012], rel=TOLERANCE)
    loss, gradient = loss_and_gradient(RankDPO(5000.0), group_of([0.0] * 4, UNANIMOUS))
    assert loss == pytest.approx(1.2701653479, rel=TOLERANCE) == math.log(2) * 1.8324612485
    # Not 0: half of beta times (weights over worse images - weights over better ones).
    delta = {(0, 1): 0.2196907088, (0, 2): 0.5338541156, (0, 3): 0.8213601063, (1, 2): 0.0618582563,
             (1, 3): 0.1697026851, (2, 3): 0.0259953763}  # fmt: skip
    expected = [2500 * (sum(v for p, v in delta.items() if p[0] == i) - sum(v for p, v in delta.items() if p[1] == i))
                for i in range(4)]  # fmt: skip
    assert gradient == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("phi", "loss"), [([1.0, 0.0], 0.0002944116), ([0.6, 0.4], 5.77661001e-05)])
def test_rankdpo_vector_e_two_images(phi: list[float], loss: float) -> None:
    """K = 2 is Diffusion-DPO with twice the beta, times the one weight."""
    group = group_of([-1e-3, 5e-4], phi)
    out = RankDPO(5000.0)(group)
    assert out.loss.item() == pytest.approx(loss, rel=1e-6)
    delta = out.metrics["weight_sum"]
    assert delta.item() == pytest.approx((2 ** phi[0] - 2 ** phi[1]) * 0.532456, rel=1e-5)
    torch.testing.assert_close(out.loss, delta * DiffusionDPO(10_000.0)(group).loss, rtol=1e-12, atol=0)


def test_rankdpo_vector_f_weights() -> None:
    from diffalign.objectives.rankdpo import pair_weights

    weights = pair_weights(group_of(S, [0.98, 0.95, 0.89, 0.59]))[0].tolist()
    expected = {(0, 3): 0.3837547696, (0, 1): 0.0216138463, (0, 2): 0.0860490301, (1, 2): 0.0148651226,
                (1, 3): 0.1232540566, (2, 3): 0.0347973166}  # fmt: skip
    for (i, j), value in expected.items():
        assert weights[i][j] == pytest.approx(value, rel=1e-6) and weights[j][i] == 0.0


def test_rankdpo_vector_g_ties() -> None:
    """Tied labels: the mean over both orders of the tie, whatever `order` says; average ranks give another number."""
    phi = [0.8, 0.5, 0.5, 0.2]
    losses = [RankDPO(5000.0)(group_of(S, phi, order)).loss.item() for order in ([0, 1, 2, 3], [0, 2, 1, 3])]
    assert losses[0] == losses[1] == pytest.approx((0.1281985439 + 0.1019723293) / 2, rel=TOLERANCE)
    assert losses[0] != pytest.approx(0.1155080040, rel=1e-3)
    assert RankDPO()(group_of(S, phi)).metrics["weight_sum"].item() == pytest.approx(0.9996920671, rel=TOLERANCE)
    for ranks, loss in (([1, 2, 3, 4], 0.1281985439), ([1, 3, 2, 4], 0.1019723293)):
        assert rankdpo(S, phi, 5000.0, ranks)[0] == pytest.approx(loss, rel=TOLERANCE)


@pytest.mark.parametrize(
    ("kind", "scale", "beta", "loss"),
    [
        ("shared", 1.0, 20.0, 1.9214631451),
        ("shared", 8.0, 20.0, 8.9857661618),  # summed errors
        ("shared", 8.0, 2.5, 1.9214631451),  # beta / N on summed errors is beta on mean errors
        ("independent", 1.0, 20.0, 1.6632456122),
        ("flow", 1.0, 20.0, 0.4783724597),
        ("flow", 0.49, 20.0, 0.6729907570),  # (1 - t)^2: errors of epsilon
    ],
)
def test_rankdpo_vector_h_end_to_end(kind: str, scale: float, beta: float, loss: float) -> None:
    policy, reference = (scale * e for e in numpy_errors(kind))
    group = GroupErrors(policy, reference, torch.tensor([UNANIMOUS], dtype=torch.float64))
    assert RankDPO(beta)(group).loss.item() == pytest.approx(loss, rel=TOLERANCE)


def test_vector_j_errors_must_not_be_reduced_in_half_precision() -> None:
    """The trainer's reduction agrees with float64 to 1e-7; in bfloat16 the margins would be noise of several units."""
    from diffalign.training.preference.step import squared_error

    generator = torch.Generator().manual_seed(0)
    prediction = torch.randn(1, 4, 4, 16, 16, generator=generator).bfloat16()
    target = prediction.float() + 0.35 * torch.randn(1, 4, 4, 16, 16, generator=generator)
    exact = (prediction.double() - target.double()).square().mean(dim=(2, 3, 4))
    assert float((squared_error(prediction, target).double() - exact).abs().max()) < 1e-7
    rounded = (prediction - target.bfloat16()).square().mean(dim=(2, 3, 4))
    assert float((rounded.double() - exact).abs().max()) * 2500 > 0.5


OBJECTIVES = [
    RankDPO(3.0), RankDPO(3.0, ranked_by="model"), RankDPO(3.0, pair_weight="gain"), RankDPO(3.0, pair_weight="none"),
    SmPO(3.0, 10.0), GDRO(3.0, 0.1, 0.7), GDRO(3.0, 0.0, 0.0),
]  # fmt: skip


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("steps", [0, 3])
def test_permuting_the_images_changes_nothing(objective: Any, steps: int) -> None:
    group = random_group(0, steps=steps)
    loss = objective(group).loss
    turn = torch.tensor([3, 0, 4, 2, 1])
    fields = (group.policy_error, group.reference_error, group.rewards, group.order)
    policy, reference, labels, order = (f[:, turn] for f in fields if f is not None)
    turned = objective(GroupErrors(policy, reference, labels, order=order)).loss
    torch.testing.assert_close(turned, loss, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("objective", [o for o in OBJECTIVES if getattr(o, "gamma", 0) != 0.7], ids=str)
def test_only_differences_of_errors_matter(objective: Any) -> None:
    """Gradients over a group sum to 0, and a common shift of the errors changes nothing (without GDRO's SFT term)."""
    group = random_group(1)
    loss = objective(group).loss
    (gradient,) = torch.autograd.grad(loss.sum(), group.policy_error)
    torch.testing.assert_close(gradient.sum(1), torch.zeros(6, dtype=torch.float64), atol=1e-10, rtol=0)
    shift = torch.rand(6, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    moved = GroupErrors(group.policy_error + shift, group.reference_error, group.rewards, order=group.order)
    torch.testing.assert_close(objective(moved).loss, loss, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_gradients_equal_finite_differences(objective: Any) -> None:
    group = random_group(3, groups=2, k=4, steps=3)

    def loss(policy: Tensor) -> Tensor:
        return objective(GroupErrors(policy, group.reference_error, group.rewards, order=group.order)).loss

    assert torch.autograd.gradcheck(loss, (group.policy_error,))


def test_swapping_two_labels_swaps_the_gradients() -> None:
    _, first = loss_and_gradient(RankDPO(5000.0), group_of([1e-4, 1e-4, -2e-4, 0.0], [0.9, 0.3, 0.5, 0.1]))
    _, second = loss_and_gradient(RankDPO(5000.0), group_of([1e-4, 1e-4, -2e-4, 0.0], [0.3, 0.9, 0.5, 0.1]))
    assert first[:2] == pytest.approx(second[1::-1]) and first[2:] == pytest.approx(second[2:])


def test_ranks_of_the_model_start_with_the_ties_broken() -> None:
    """All d are 0 before the first update; shared ranks would leave the gradient 0 for ever."""
    group = group_of([0.0] * 4, UNANIMOUS, [2, 0, 3, 1])
    loss, gradient = loss_and_gradient(RankDPO(5000.0, ranked_by="model"), group)
    oracle = rankdpo([0.0] * 4, UNANIMOUS, 5000.0, [3, 1, 4, 2])
    assert loss == pytest.approx(oracle[0]) and gradient == pytest.approx(oracle[1].tolist())
    assert min(map(abs, gradient)) > 0


def test_rankdpo_refuses_what_is_no_vote_share() -> None:
    assert "reach from" in str(check_labels(torch.tensor([[0.2, 21.0]]), RankDPO.label_kind))


# PickScore's cosines, bounds and all, as in the authors' code.
BOUNDS: dict[str, float] = {"reward_min": 0.11543526500463486, "reward_max": 0.28201571106910706}


@pytest.mark.parametrize(
    ("scores", "weight"),
    [
        ((0.225, 0.205), 0.59959047),
        ((0.220, 0.219), 0.03001544),
        ((0.230, 0.190), 1.19488523),
        ((0.2, 0.2), 0.0),
        ((0.28201571106910706, 0.11543526500463486), 4.62117157),
    ],
)
def test_smpo_vector_2_smoothing(scores: tuple[float, float], weight: float) -> None:
    group = group_of([0.0, 0.0], scores)
    assert SmPO(2000.0, 10.0, **BOUNDS).smoothing(group).item() == pytest.approx(weight, abs=1e-8)
    swapped = group_of([0.0, 0.0], scores[::-1])
    assert SmPO(2000.0, 10.0, **BOUNDS).smoothing(swapped).item() == pytest.approx(weight, abs=1e-8)  # never negative


def smpo_pair(p: float, beta: float) -> tuple[float, float, float, float]:
    """Loss, margin and both gradients of the published pair of errors at a given p."""
    policy = torch.tensor([[0.1000, 0.1004]], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([[0.1002, 0.1003]], dtype=torch.float64)
    labels = torch.tensor([[math.log(p / (1 - p)), 0.0]], dtype=torch.float64)
    out = SmPO(beta, 10.0)(GroupErrors(policy, reference, labels))
    (gradient,) = torch.autograd.grad(out.loss.sum(), policy)
    return out.loss.item(), out.metrics["margin"].item(), *gradient[0].tolist()


@pytest.mark.parametrize(
    ("p", "beta", "margin", "loss", "pull"),
    [
        (0.5299795237, 2000.0, 0.17987714, 0.60724764, 272.904549),
        (0.5299795237, 5000.0, 0.44969286, 0.49336855, 583.751984),
        (0.7310585786, 2000.0, 1.38635147, 0.22313213, 924.192088),
        (0.55, 2000.0, 0.3, 0.55435524, None),  # gamma (2p - 1) = 1: Diffusion-DPO
        (0.5, 2000.0, 0.0, 0.69314718, 0.0),
    ],
)
def test_smpo_vector_3_loss(p: float, beta: float, margin: float, loss: float, pull: float | None) -> None:
    found, inside, winner, loser = smpo_pair(p, beta)
    assert (found, inside) == (pytest.approx(loss, rel=TOLERANCE), pytest.approx(margin, rel=TOLERANCE, abs=1e-12))
    assert winner == -loser
    assert pull is None or winner == pytest.approx(pull, rel=TOLERANCE)


def test_smpo_vector_1_and_a_batch_of_two() -> None:
    """(2 alpha - gamma) in front of the difference of log-ratios, and two pairs with a factor each."""
    policy, reference = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[0.3, -0.2]], dtype=torch.float64)
    labels = torch.tensor([[math.log(0.6 / 0.4), 0.0]], dtype=torch.float64)  # alpha = 6, gamma = 10
    assert SmPO(2.0, 10.0)(GroupErrors(policy, reference, labels)).metrics["margin"].item() == pytest.approx(1.0)
    policy = torch.tensor([[0.1000, 0.1004], [0.2, 0.19]], dtype=torch.float64)
    reference = torch.tensor([[0.1002, 0.1003], [0.201, 0.192]], dtype=torch.float64)
    labels = torch.tensor([[math.log(p / (1 - p)), 0.0] for p in (0.5299795237, 0.575)], dtype=torch.float64)
    out = SmPO(2000.0, 10.0)(GroupErrors(policy, reference, labels))
    assert out.metrics["margin"].tolist() == pytest.approx([0.17987714, -1.5], rel=TOLERANCE)
    assert out.loss.mean().item() == pytest.approx(1.15433046, rel=TOLERANCE)


def test_smpo_with_a_factor_of_one_is_dpo() -> None:
    d, labels = [2e-4, -1e-4, 5e-4], [math.log(0.55 / 0.45), 0.0, 0.1]
    smoothed, plain = (o(group_of(d, labels)).loss for o in (SmPO(2000.0, 10.0), DiffusionDPO(2000.0)))
    torch.testing.assert_close(smoothed, plain, rtol=1e-12, atol=0)


@pytest.mark.parametrize("seed", range(5))
def test_random_groups_equal_the_loops(seed: int) -> None:
    group = random_group(seed, groups=1, k=6, steps=4)
    d = group.error_difference.detach()[0].numpy()
    labels, order = group.labels[0].tolist(), group.order[0].tolist() if group.order is not None else None
    assert implicit(list(-d), labels, 0.2, order)[0] == pytest.approx(gdro(-d, labels, 0.2, order)[0], rel=1e-9)
    # Tied labels in RankDPO: the mean of the loop's loss over many random orders of the ties.
    rng, losses = np.random.default_rng(seed), []
    for _ in range(4000):
        turn = np.lexsort((rng.random(6), [-label for label in labels]))
        losses.append(rankdpo(d, labels, 3.0, np.argsort(turn) + 1)[0])
    found = RankDPO(3.0)(group).loss.item()
    assert found == pytest.approx(np.mean(losses), abs=5 * np.std(losses) / math.sqrt(4000) + 1e-9)
