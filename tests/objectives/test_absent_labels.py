"""Objectives called directly with an image that has no label: it is no loser and no winner, or the call is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from diffalign.objectives import (
    DDO,
    GDRO,
    IPO,
    MADPO,
    SFT,
    ConstrainedDPO,
    DiffusionDPO,
    DisCO,
    GroupErrors,
    RankDPO,
    SimPO,
    SmPO,
    best_and_worst,
    ranking,
)

NAN = math.nan
PAIR_METHODS: list[Any] = [DiffusionDPO(), IPO(), MADPO(), ConstrainedDPO(), SimPO(), SmPO(), SFT()]


def errors(labels: list[float], chosen: list[int] | None = None) -> GroupErrors:
    """One group with these labels; or the images `chosen` of it alone."""
    generator = torch.Generator().manual_seed(3)
    policy, reference, gap = (torch.rand(1, len(labels), generator=generator, dtype=torch.float64) for _ in range(3))
    rewards = torch.tensor([labels], dtype=torch.float64)
    fields = [field if chosen is None else field[:, chosen] for field in (policy, reference, rewards, gap)]
    policy, reference, rewards, gap = fields
    return GroupErrors(policy.requires_grad_(), reference, rewards, prediction_gap=gap, role=rewards)


@pytest.mark.parametrize("absent", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize("place", range(4))
def test_the_absent_come_last_and_are_neither_best_nor_worst(place: int, absent: float) -> None:
    labels = [0.7, 0.1, 0.4, 0.2]
    labels[place] = absent
    group = errors(labels)
    known = [k for k in range(4) if k != place]
    assert ranking(group)[0, -1] == place
    best, worst = best_and_worst(group)
    assert best.item() == max(known, key=lambda k: labels[k]) and worst.item() == min(known, key=lambda k: labels[k])


def test_groups_of_one_batch_may_lack_different_images() -> None:
    rewards = torch.tensor([[NAN, 0.1, 0.9], [0.3, NAN, NAN], [NAN, NAN, NAN], [0.2, 0.1, 0.3]])
    best, worst = best_and_worst(GroupErrors(rewards, rewards=rewards))
    assert best[[0, 1, 3], 0].tolist() == [2, 0, 2] and worst[[0, 1, 3], 0].tolist() == [1, 0, 1]


@pytest.mark.parametrize("objective", [*PAIR_METHODS, RankDPO(), RankDPO(pair_weight="gain"), DDO()])
@pytest.mark.parametrize("place", [0, 2, 3])
def test_the_loss_is_that_of_the_labelled_images(objective: Any, place: int) -> None:
    labels = [1.0, 0.0, 1.0, 0.0] if isinstance(objective, DDO) else [1.0, 0.2, 0.6, 0.4]
    labels[place] = NAN
    group = errors(labels)
    alone = errors(labels, [k for k in range(4) if k != place])
    loss = objective(group).loss
    torch.testing.assert_close(loss, objective(alone).loss)
    (gradient,) = torch.autograd.grad(loss.sum(), group.policy_error)
    assert gradient[0, place] == 0 and gradient.isfinite().all()


@pytest.mark.parametrize("objective", [GDRO(), GDRO(tau=0), DisCO(), DisCO(threshold=0.5)])
@pytest.mark.parametrize("absent", [NAN, math.inf])
def test_a_loss_over_all_images_refuses(objective: Any, absent: float) -> None:
    with pytest.raises(ValueError, match="an image has no label: give this objective the labelled images"):
        objective(errors([1.0, absent, 0.6, 0.4]))
