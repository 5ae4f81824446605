"""Group DPO, NFT and AWM: numbers worked out in numpy, identities between them, and their edges."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffalign.objectives import AWM, NFT, DiffusionDPO, GroupDPO, GroupErrors, check_labels
from diffalign.objectives.advantages import standardised

ERRORS, REFERENCE, LABELS = (0.50, 0.42, 0.61, 0.47), (0.48, 0.45, 0.58, 0.47), (0.9, 0.4, 0.4, 0.1)
GAPS = (0.010, 0.012, 0.008, 0.015)
OPTIMALITY = (0.65661536, 0.48259829, 0.48259829, 0.37818805)


def group_of(
    errors: Any = ERRORS,
    reference: Any = REFERENCE,
    labels: Any = LABELS,
    dtype: torch.dtype = torch.float64,
    **more: Any,
) -> GroupErrors:
    """One group whose policy error takes gradients; `more` are rows of one group or [1]."""
    fields = [torch.tensor([list(row)], dtype=dtype) for row in (errors, reference, labels)]
    given = {name: torch.as_tensor(np.array([value]), dtype=dtype) for name, value in more.items()}
    return GroupErrors(fields[0].requires_grad_(), fields[1], fields[2], **given)


def gradient(objective: Any, group: GroupErrors) -> list[float]:
    (found,) = torch.autograd.grad(objective(group).loss.sum(), group.policy_error)
    return [float(x) for x in found[0]]


def numpy_advantages(labels: np.ndarray, ddof: int, eps: float) -> np.ndarray:
    return np.asarray((labels - labels.mean()) / (labels.std(ddof=ddof) + eps))


# --- group DPO -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "margin", "loss", "slope"),
    [
        (
            GroupDPO(100.0, "sum"),
            -1.35680101,
            1.58591323,
            [53.94907331, -5.99434148, -5.99434148, -41.96039035],
        ),
        (GroupDPO(5000.0, "sum"), -67.84005048, 67.84005048, [3392.00252, -376.88917, -376.88917, -2638.22419]),
        (
            GroupDPO(100.0, "sum", "population", 1e-4),
            -1.56615364,
            1.75582060,
            [64.77882298, -7.19764700, -7.19764700, -50.38352898],
        ),
        # DGPO's beta 100, and no 1/2 before it.
        (
            GroupDPO(200.0, "mean", "population", 1e-4),
            -0.78307684,
            -math.log(1 - 0.68634286),
            [26.87295919, -2.98588435, -2.98588435, -20.90119048],
        ),
    ],
)
def test_group_dpo_vectors(objective: GroupDPO, margin: float, loss: float, slope: list[float]) -> None:
    out = objective(group_of())
    assert out.metrics["margin"].item() == pytest.approx(margin, rel=3e-8)
    assert out.loss.item() == pytest.approx(loss, rel=3e-8)
    assert gradient(objective, group_of()) == pytest.approx(slope, rel=1e-7)
    single = group_of(dtype=torch.float32)
    assert gradient(objective, single) == pytest.approx(slope, rel=1e-5)


def test_group_dpo_of_the_paper() -> None:
    group = group_of((0.300, 0.310, 0.305, 0.290), (0.302, 0.308, 0.306, 0.291), (0.6, 23 / 60, 7 / 15, 0.625))
    out = GroupDPO(5000.0, "sum")(group)
    assert out.metrics["margin"].item() == pytest.approx(10.69724205, rel=1e-8)
    assert out.loss.item() == pytest.approx(2.26069460e-5, rel=1e-7)
    wanted = [0.04030487, -0.06717479, -0.02583646, 0.05270637]
    assert gradient(GroupDPO(5000.0, "sum"), group) == pytest.approx(wanted, abs=6e-9)


def test_group_dpo_of_two_images_is_dpo() -> None:
    pair: Any = {"errors": (0.50, 0.42), "reference": (0.48, 0.45), "labels": (0.9, 0.1)}
    cases = ((GroupDPO(100.0, "sum"), 100 / math.sqrt(2)), (GroupDPO(100.0, "sum", "population", 0.0), 100.0))
    for objective, beta in cases:
        assert gradient(objective, group_of(**pair)) == pytest.approx(
            gradient(DiffusionDPO(beta), group_of(**pair)), rel=1e-6
        )
    assert cases[0][0](group_of(**pair)).loss.item() == pytest.approx(1.92538055, abs=1e-7)
    assert cases[1][0](group_of(**pair)).loss.item() == pytest.approx(2.57888973, abs=1e-8)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_group_dpo_does_not_see_a_number_added_to_every_d(reduction: Any) -> None:
    objective = GroupDPO(300.0, reduction)
    moved = group_of([e + 0.2 for e in ERRORS])
    assert objective(moved).loss.item() == pytest.approx(objective(group_of()).loss.item(), abs=1e-11)


def test_groups_without_spread_have_no_pull() -> None:
    for objective, labels in ((GroupDPO(), (0.4,) * 4), (GroupDPO(min_spread=0.9), LABELS)):
        group = group_of(labels=labels)
        assert objective(group).loss.item() == pytest.approx(math.log(2)) and gradient(objective, group) == [0.0] * 4
    assert any(gradient(GroupDPO(min_spread=0.8), group_of()))
    alone = group_of((0.5,), (0.4,), (0.9,))
    assert GroupDPO()(alone).loss.item() == pytest.approx(math.log(2)) and gradient(GroupDPO(), alone) == [0.0]


def test_an_advantage_is_cut_at_the_clip() -> None:
    outlier = (1.0, *[0.0] * 35)  # sqrt(35) deviations away
    clipped, free = (
        GroupDPO(clip=clip).advantages(torch.tensor([outlier], dtype=torch.float64)) for clip in (5.0, None)
    )
    assert clipped.max() == 5.0 and free.max() == pytest.approx(35 / 6, rel=1e-6)


# --- NFT -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("beta", "normalise", "per_image"),
    [
        (1.0, "none", [0.49313231, 0.46346174, 0.58723432, 0.48865436]),
        (0.5, "none", [0.96813231, 0.90746174, 1.16323432, 0.95115436]),
        (0.1, "none", [4.80413231, 4.50266174, 5.80003432, 4.70515436]),
        (1.0, "rms", [0.70220103, 0.68007821, 0.76617799, 0.69896011]),
        (0.1, "rms", [6.93118144, 6.71011467, 7.61578196, 6.85940457]),
    ],
)
def test_nft_vectors(beta: float, normalise: Any, per_image: list[float]) -> None:
    objective = NFT(beta, normalise, scale=1.0, anchor=0.0)
    for dtype, relative in ((torch.float64, 3e-8), (torch.float32, 1e-5)):
        group = group_of(labels=OPTIMALITY, prediction_gap=GAPS, dtype=dtype)
        assert objective(group).loss.item() == pytest.approx(np.mean(per_image), rel=relative)
        for i, value in enumerate(per_image):
            rows = (ERRORS, REFERENCE, OPTIMALITY)
            alone = group_of(*([row[i]] for row in rows), prediction_gap=[GAPS[i]], dtype=dtype)
            assert objective(alone).loss.item() == pytest.approx(value, rel=relative)


def test_nft_has_the_same_first_gradient_for_every_beta() -> None:
    """With a gap that does not answer: (2 r - 1) / K."""
    for beta in (1.0, 0.5, 0.1):
        group = group_of(labels=OPTIMALITY, prediction_gap=GAPS)
        found = [4 * g for g in gradient(NFT(beta, "none", 1.0, 0.0), group)]
        assert found == pytest.approx([0.31323073, -0.03480341, -0.03480341, -0.24362390], abs=2e-8)


def test_nft_of_the_released_code() -> None:
    """Its normaliser and its factor 5, from mean residuals of x0 at t = 0.6; and from the root mean square."""
    t2, r = 0.36, 0.7
    row: Any = {
        "errors": [0.11237089 * t2], "reference": [0.15925863 * t2], "labels": [r], "prediction_gap": [0.01128880 * t2],
        "policy_l1": [[0.16358204, 0.21781886]],
    }  # fmt: skip
    assert NFT(1.0, "l1", anchor=0.0)(group_of(**row)).loss.item() == pytest.approx(1.43257835, abs=3e-7)
    assert NFT(1.0, "rms", anchor=0.0)(group_of(**row)).loss.item() == pytest.approx(1.13438297, abs=3e-7)
    assert NFT(0.3, "l1").mixed_residuals == (0.3, -0.3) and NFT(0.3).mixed_residuals == ()


@pytest.mark.parametrize("normalise", ["none", "l1"])
@pytest.mark.parametrize("beta", [1.0, 0.4])
def test_nft_is_the_loss_of_its_two_implicit_policies(normalise: Any, beta: float) -> None:
    """Predictions of 6 elements in numpy: v+ and v- themselves, not the errors' identities."""
    rng = np.random.default_rng(4)
    v, old, target, base = rng.standard_normal((4, 3, 6))
    r = np.array([0.9, 0.2, 0.5])
    total = np.zeros(3)
    residuals = []
    for share, weight in ((beta, r), (-beta, 1 - r)):
        residual = share * v + (1 - share) * old - target
        residuals.append(np.abs(residual).mean(1))
        total += weight * (residual**2).mean(1) / (residuals[-1] if normalise == "l1" else 1.0) / beta
    wanted = 5 * total.mean() + 0.02 * ((v - base) ** 2).mean()
    group = group_of(
        ((v - target) ** 2).mean(1),
        ((old - target) ** 2).mean(1),
        r,
        prediction_gap=((v - old) ** 2).mean(1),
        anchor_gap=((v - base) ** 2).mean(1),
        policy_l1=np.stack(residuals, axis=1),
    )
    assert NFT(beta, normalise, anchor=0.02)(group).loss.item() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(
    ("beta", "optima"), [(1.0, (0.8, 0.38, 0.2, -0.4)), (0.5, (1.4, 0.56, 0.2, -1.0)), (0.1, (6.2, 2.0, 0.2, -5.8))]
)
def test_nft_is_least_where_its_closed_form_says(beta: float, optima: tuple[float, ...]) -> None:
    for pull, optimum in zip((1.0, 0.3, 0.0, -1.0), optima, strict=True):
        v = torch.tensor([[optimum]], dtype=torch.float64, requires_grad=True)
        group = GroupErrors(
            (v - 0.8) ** 2,
            torch.full_like(v, 0.36).detach(),
            torch.full_like(v, 0.5 + pull / 2).detach(),
            prediction_gap=(v - 0.2) ** 2,
        )
        (slope,) = torch.autograd.grad(NFT(beta, "none", 1.0, 0.0)(group).loss.sum(), v, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), v)
        assert slope.item() == pytest.approx(0.0, abs=1e-12) and curvature.item() > 0


# --- AWM -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "loss", "slope"),
    [
        ("uniform", 0.00779214, [0.38378543, -0.04482917, -0.04221852, -0.30452987]),
        ("t", 0.00468448, [0.23212082, -0.02657666, -0.02563692, -0.18271792]),
        ("t2", 0.00281403, [0.13994260, -0.01583160, -0.01549330, -0.10963075]),
    ],
)
def test_awm_vectors(weight: Any, loss: float, slope: list[float]) -> None:
    labels = numpy_advantages(np.array(LABELS), 0, 1e-4)
    objective = AWM(weight, scale=1.0, anchor=0.0)
    for dtype, close in ((torch.float64, 6e-9), (torch.float32, 4e-7)):
        group = group_of(labels=labels, time=0.6, dtype=dtype)
        assert objective(group).loss.item() == pytest.approx(loss, abs=close)
        assert gradient(objective, group) == pytest.approx(slope, abs=close)


def test_awm_on_other_errors() -> None:
    time, errors = torch.tensor([0.6], dtype=torch.float64), torch.tensor([ERRORS], dtype=torch.float64)
    found = AWM("generalised_huber").weighted(errors, time)[0].tolist()
    assert found == pytest.approx([2.01056193, 1.92448368, 2.11342534, 1.97958366], abs=6e-9)
    found = AWM("huber").weighted(errors, time)[0].tolist()
    assert found == pytest.approx([0.42425807, 0.38883844, 0.46860898, 0.41133328], abs=6e-9)
    labels = numpy_advantages(np.array(LABELS), 0, 1e-4)
    out = AWM("generalised_huber", scale=1.0, anchor=0.0)(group_of(labels=labels, time=0.6))
    assert out.loss.item() == pytest.approx(np.mean([-1.53438738, 0.17996588, 0.16945377, 1.21811950]), abs=6e-9)


def test_awm_cuts_ratios_that_would_lead_too_far() -> None:
    labels = numpy_advantages(np.array(LABELS), 0, 1e-4)
    objective = AWM(clip=0.01, scale=1.0, anchor=0.0)
    group = group_of(labels=labels)
    out = objective(group)
    assert out.loss.item() == pytest.approx(np.mean([-1.53514172, 0.17931668, 0.17227690, 1.21811950]), abs=6e-9)
    assert out.metrics["clipped"].item() == 0.25
    found = gradient(objective, group)
    assert found[2] == 0.0 and found[1] != 0.0


def test_awm_adds_its_anchors() -> None:
    labels, gaps = numpy_advantages(np.array(LABELS), 0, 1e-4), np.array(GAPS)
    group = group_of(labels=labels, prediction_gap=gaps, anchor_gap=2 * gaps)
    plain = AWM(anchor=0.0)(group).loss.item()
    assert AWM(anchor=3.0, old_gap=0.5)(group).loss.item() == pytest.approx(plain + 6.5 * gaps.mean())


def test_awm_at_the_reference_is_minus_the_mean_advantage() -> None:
    labels = (2.0, 0.5, -1.0)
    assert AWM(anchor=0.0)(group_of((0.1, 0.2, 0.3), (0.1, 0.2, 0.3), labels)).loss.item() == pytest.approx(-0.1)


@pytest.mark.parametrize("seed", range(6))
def test_group_dpo_and_awm_against_numpy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    e, r, labels = rng.random((3, 6))
    t, c = rng.random(), 0.3
    a = numpy_advantages(labels, 1, 1e-8)
    x = -0.5 * 30 * (a * (e - r)).mean()
    assert GroupDPO(30.0)(group_of(e, r, labels)).loss.item() == pytest.approx(np.log1p(np.exp(-x)), rel=1e-9)
    slope = 15 / 6 * a / (1 + np.exp(x))
    assert gradient(GroupDPO(30.0), group_of(e, r, labels)) == pytest.approx(slope.tolist(), rel=1e-9)
    centred = 3 * (labels - labels.mean())
    ratio = np.exp(-t * (e - r))
    wanted = -np.minimum(ratio * centred / 5, np.clip(ratio, 1 - c, 1 + c) * centred / 5).mean()
    group = group_of(e, r, centred, time=t)
    assert AWM("t", clip=c, anchor=0.0)(group).loss.item() == pytest.approx(wanted, rel=1e-9)


# --- what they share -------------------------------------------------------------------------------------------------


def test_first_gradients_are_multiples_of_the_advantages() -> None:
    """At policy = reference, in predictions and not in errors: the gap answers too, and has no first-order part."""
    torch.manual_seed(1)
    shape = (1, 5, 7)
    old, target = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    scores = torch.tensor([[0.9, 0.4, 0.7, 0.1, 0.3]], dtype=torch.float64)
    advantage = standardised(scores, epsilon=0.0)
    labels = {"group_dpo": scores, "nft": advantage / 10 + 0.5, "awm": advantage}
    objectives: dict[str, Any] = {
        "group_dpo": GroupDPO(700.0, "sum", "population", 0.0),
        "nft": NFT(0.3, "none", anchor=0.0),
        "awm": AWM(anchor=0.0, old_gap=2.0),
    }
    wanted = None
    for name, objective in objectives.items():
        v = old.clone().requires_grad_()
        group = GroupErrors(
            (v - target).square().mean(2),
            (old - target).square().mean(2),
            labels[name],
            prediction_gap=(v - old).square().mean(2),
        )
        (found,) = torch.autograd.grad(objective(group).loss.sum(), v)
        if wanted is None:
            error = (old.clone().requires_grad_() - target).square().mean(2)
            leaf = old.clone().requires_grad_()
            error = (advantage * (leaf - target).square().mean(2)).sum()
            (wanted,) = torch.autograd.grad(error, leaf)
        ratio = found / wanted
        torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-10, atol=0)
        assert ratio.mean() > 0


def random_case(seed: int, k: int = 5) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Fields of three random groups, and objectives that take them."""
    generator = torch.Generator().manual_seed(seed)

    def values() -> Tensor:
        return torch.rand(3, k, generator=generator, dtype=torch.float64)

    fields = {"policy_error": values(), "reference_error": values(), "prediction_gap": values(), "anchor_gap": values()}
    fields["time"] = torch.rand(3, generator=generator, dtype=torch.float64)
    fields["rewards"] = values() - 0.5
    return fields, {
        "group_dpo": GroupDPO(2.0),
        "nft": NFT(0.7, "none"),
        "awm": AWM("t", clip=0.05, anchor=0.1),
    }


def labels_for(name: str, rewards: Tensor) -> Tensor:
    return rewards + 0.5 if name == "nft" else rewards - rewards.mean(1, keepdim=True)


@pytest.mark.parametrize("name", ["group_dpo", "nft", "awm"])
def test_gradients_by_finite_differences(name: str) -> None:
    fields, objectives = random_case(2)
    fields["rewards"] = labels_for(name, fields["rewards"])
    policy, objective = fields.pop("policy_error"), objectives[name]
    assert torch.autograd.gradcheck(
        lambda e: objective(GroupErrors(e, **fields)).loss, policy.requires_grad_(), eps=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("name", ["group_dpo", "nft", "awm"])
def test_permuting_images_permutes_the_gradient_and_groups_do_not_mix(name: str) -> None:
    fields, objectives = random_case(3)
    fields["rewards"] = labels_for(name, fields["rewards"])

    def slopes(chosen: dict[str, Tensor]) -> Tensor:
        leaf = chosen["policy_error"].clone().requires_grad_()
        group = GroupErrors(leaf, **{k: v for k, v in chosen.items() if k != "policy_error"})
        (found,) = torch.autograd.grad(objectives[name](group).loss.sum(), leaf)
        return found

    order = torch.tensor([3, 0, 4, 1, 2])
    moved = {k: v[:, order] if v.dim() == 2 else v for k, v in fields.items()}
    torch.testing.assert_close(slopes(moved), slopes(fields)[:, order], rtol=1e-12, atol=1e-15)
    second = {k: v[1:2] for k, v in fields.items()}
    torch.testing.assert_close(slopes(second), slopes(fields)[1:2], rtol=1e-12, atol=1e-15)


def test_what_is_missing_is_named() -> None:
    for objective, message in (
        (NFT(), "prediction_gap is missing"),
        (AWM("t"), "time is missing"),
        (AWM(), "anchor_gap is missing"),
        (AWM(anchor=0.0, old_gap=1.0), "prediction_gap is missing"),
    ):
        with pytest.raises(ValueError, match=message):
            objective(group_of(labels=(1.0, 0.0, -1.0, 0.0)))
    with pytest.raises(ValueError, match="policy_l1 is missing"):
        NFT(normalise="l1")(group_of(labels=OPTIMALITY, prediction_gap=GAPS))


def test_labels_are_checked() -> None:
    fine = torch.tensor([[0.5, -0.5, math.nan], [0.0, 0.0, 0.0], [1.0, math.nan, math.nan]])
    assert check_labels(fine, "advantage") is None
    assert "labels.transform=advantage" in str(check_labels(torch.tensor([[0.5, 0.2]]), "advantage"))
    assert check_labels(torch.tensor([[0.5, math.nan, 1.0]]), "optimality") is None
    assert "labels.transform=optimality" in str(check_labels(torch.tensor([[0.5, 1.2]]), "optimality"))
