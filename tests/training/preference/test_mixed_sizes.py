"""Groups of mixed size train: every group counts as it would alone, with the images that it has."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffalign.objectives import (
    AWM,
    DDO,
    GDRO,
    IPO,
    NFT,
    SFT,
    DiffusionDPO,
    DisCO,
    GroupDPO,
    LinearDPO,
    Listwise,
    Objective,
    RankDPO,
    SimPO,
    SmPO,
)
from diffalign.pipelines.process import Flow
from diffalign.training.preference.draws import Draws, make_draws
from diffalign.training.preference.selection import Selection, loser_by_rank, loser_by_score
from diffalign.training.preference.step import preference_step, used_members
from helpers import toy

NAN = float("nan")
SIZES = [4, 3, 2, 3]
OBJECTIVES: list[Objective] = [
    RankDPO(beta=20.0), GDRO(beta=20.0, tau=0.1), GDRO(beta=20.0, tau=0.0), DisCO(beta=20.0), DDO(beta=20.0),
    DiffusionDPO(beta=20.0), IPO(beta=20.0), SmPO(beta=20.0), SimPO(), SFT(), GroupDPO(omega=20.0), Listwise(beta=20.0),
    LinearDPO(), NFT(normalise="l1"), AWM("t", anchor=0.1),
]  # fmt: skip


def mixed(garbage: float = 0.0, scattered: bool = False) -> toy.ToySource:
    """Groups of four to two images; what lies in the slots of the others is `garbage`. scattered: not at the end."""
    source = toy.ToySource(groups=len(SIZES))
    source.rewards = torch.tensor([[0.9, 0.1, 0.6, 0.4]] * len(SIZES))
    for row, size in enumerate(SIZES):
        absent = torch.arange(4) < 4 - size if scattered else torch.arange(4) >= size
        source.rewards[row, absent], source.latents[row, absent] = NAN, garbage
    return source


def config(objective: Objective, **sections: Any) -> Any:
    plain = toy.toy_config(Path("x"), **sections)
    return SimpleNamespace(**{**dict(plain), "error_space": plain.error_space})


def step_of(source: toy.ToySource, objective: Objective, rows: list[int], images: list[int] | None = None) -> Any:
    """The objective on these groups of a source, or on some images of each alone; with the gradient of every loss."""
    backbone, settings = toy.ToyBackbone(), config(objective)
    backbone.trunk.up.data = torch.randn(backbone.trunk.up.shape, generator=torch.Generator().manual_seed(2)) / 10
    batch = source.batch(rows)
    if images is not None:
        batch.latents, batch.rewards = batch.latents[:, images], batch.rewards[:, images]
    draws = make_draws(
        settings, backbone.process, 0, rows, batch.group_ids, batch.latents.shape, batch.rewards.isfinite()
    )
    if objective.label_kind == "role":
        batch.rewards = (batch.rewards > 0.5).float().masked_fill(batch.rewards.isnan(), NAN)
    if objective.label_kind == "advantage":
        batch.rewards = batch.rewards - batch.rewards.nanmean(1, keepdim=True)
    result = preference_step(settings, objective, backbone, batch, draws, source.unconditional, None)
    gradients = [torch.autograd.grad(loss, backbone.trunk.up, retain_graph=True)[0] for loss in result.output.loss]
    return result, gradients


def close(one: Tensor, other: Tensor) -> None:
    """Equal but for rounding: a matrix product of more rows adds up in another order."""
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_a_group_counts_as_it_would_alone(objective: Objective, scattered: bool) -> None:
    """Loss, metrics, weight and gradient are those of the group's own images; the rest of a row has no effect."""
    rows = list(range(len(SIZES)))
    together, gradients = step_of(mixed(garbage=50.0, scattered=scattered), objective, rows)
    assert together.weight.tolist() == [1.0] * len(SIZES)
    for row, size in enumerate(SIZES):
        images = list(range(4))[-size:] if scattered else list(range(size))
        alone, (gradient,) = step_of(mixed(scattered=scattered), objective, [row], images)
        close(together.output.loss[row : row + 1], alone.output.loss)
        close(gradients[row], gradient)
        assert set(together.metrics) == set(alone.metrics)
        for name, value in alone.metrics.items():
            close(together.metrics[name][row : row + 1], value)


def test_what_has_fewer_than_two_labels_has_no_weight_and_no_nan() -> None:
    for objective in OBJECTIVES:
        source = mixed()
        source.rewards[1, 1:], source.rewards[2] = NAN, NAN
        result, _ = step_of(source, objective, [0, 1, 2, 3])
        assert result.weight.tolist() == [1, 0, 0, 1] and result.output.loss.isfinite().all()
        assert all(value.isfinite().all() for value in result.metrics.values())


def drawn(size: int, labelled: Tensor | None, step: int) -> Draws:
    settings = toy.toy_config(Path("x"), data={"group_size": size})
    shape = torch.Size((4, 8, *toy.SHAPE))
    return make_draws(settings, Flow(), step, list(range(4)), [f"g{i}" for i in range(4)], shape, labelled)


def test_group_size_draws_among_the_images_that_are_there() -> None:
    labelled = torch.arange(8)[None] < torch.tensor([8, 5, 3, 2])[:, None]
    counts = torch.zeros(4, 8)
    for step in range(300):
        draws = drawn(3, labelled, step)
        assert torch.equal(draws.members, draws.members.sort(dim=1).values)
        assert (labelled.gather(1, draws.members).sum(1) == torch.tensor([3, 3, 3, 2])).all()
        assert torch.equal(draws.members[0], drawn(3, None, step).members[0])  # a full group is drawn as ever
        counts += torch.zeros(4, 8).scatter(1, draws.members, 1.0)
    for row, size in enumerate((8, 5)):
        assert (counts[row, :size] - 900 / size).abs().max() < 5 * (900 / size) ** 0.5
    assert counts[3, :2].tolist() == [300, 300]


@pytest.mark.parametrize("place", range(4))
def test_the_pair_of_a_step_holds_no_unlabelled_image(place: int) -> None:
    rewards = torch.tensor([[0.9, 0.1, 0.6, 0.4]])
    rewards[0, place] = NAN
    draws = Draws(torch.arange(4)[None], None, torch.zeros(1), torch.tensor([[2, 0, 3, 1]]), torch.zeros(1).bool())
    pair = used_members(DiffusionDPO(), rewards, draws)[0].tolist()
    known = [k for k in range(4) if k != place]
    assert pair == [max(known, key=lambda k: rewards[0, k]), min(known, key=lambda k: rewards[0, k])]
    assert used_members(SFT(), rewards, draws)[0].tolist() == pair[:1]
    assert sorted(used_members(GDRO(), rewards, draws)[0].tolist()) == known


def test_losers_of_a_curriculum_are_labelled_images() -> None:
    labels = torch.tensor([[0.2, 1.0, 0.9, 0.4, 0.0], [NAN, 1.0, 0.9, 0.4, NAN], [NAN, 0.1, NAN, 0.3, NAN]])
    ranked = labels.nan_to_num(-9).argsort(dim=1, descending=True)
    counts = torch.tensor([5, 3, 2])
    by_rank = [loser_by_rank(ranked, phase, 3, counts)[:, 0].tolist() for phase in range(3)]
    assert by_rank == [[4, 3, 1], [3, 3, 1], [2, 2, 1]]
    by_score = [loser_by_score(ranked, labels, phase, 3)[:, 0].tolist() for phase in range(3)]
    assert by_score == [[4, 3, 1], [3, 2, 1], [2, 2, 1]]
    one = torch.tensor([[NAN, 0.5, NAN]])
    assert loser_by_score(torch.tensor([[1, 0, 2]]), one, 0, 3).tolist() == [[1]]
    assert loser_by_rank(torch.tensor([[1, 0, 2]]), 0, 3, torch.tensor([1])).tolist() == [[1]]


@pytest.mark.parametrize(
    "selection", [{"images": "variance", "sizes": [2, 4]}, {"images": "rank_gap"}, {"images": "score_gap"}], ids=str
)
def test_a_selection_looks_at_labelled_images(selection: dict[str, Any], tmp_path: Path) -> None:
    source = mixed(scattered=True)
    settings = toy.toy_config(tmp_path, selection=selection, train={"steps": 9}, labels={"source": "scores.x"})
    chosen, labelled = Selection.of(settings, source), source.rewards.isfinite()
    ids = source.group_ids
    for step in range(9):
        draws = make_draws(settings, Flow(), step, list(range(4)), ids, torch.Size((4, 4, *toy.SHAPE)))
        members = chosen.narrow(draws, source.rewards, step, list(range(4)), ids).members
        assert all(len(set(row)) == len(row) for row in members.tolist())
        wanted = torch.tensor([min(size, members.shape[1]) for size in SIZES])
        assert torch.equal(labelled.gather(1, members).sum(1), wanted)


def test_difficulty_is_that_of_the_labelled_images(tmp_path: Path) -> None:
    """The mean label of a group does not count what it lacks as 0, or as anything."""
    source = toy.ToySource()
    source.rewards = source.rewards.abs()
    settings = toy.toy_config(tmp_path, selection={"weight": "mean"}, labels={"source": "scores.x"})
    source.rewards[0, 3] = NAN
    means = np.array([np.nanmean(row) for row in source.rewards.double().numpy()])
    expected = np.exp(-means / 2.0)
    assert Selection.of(settings, source).weights.numpy() == pytest.approx(expected / expected.mean(), rel=1e-5)


@pytest.mark.parametrize("name", ["dpo", "gdro", "rankdpo"])
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_a_run_on_mixed_groups(name: str, micro_batch: int, tmp_path: Path) -> None:
    """They learn, none is without weight, and how they are cut into micro-batches changes nothing."""

    def run(folder: Path, size: int) -> list[dict[str, float]]:
        source = toy.ToySource()
        source.rewards = source.rewards.argsort(dim=1).argsort(dim=1) / 3
        source.rewards[::3, 3], source.rewards[1::3, 2:] = NAN, NAN
        settings = toy.toy_config(
            folder, objective={"name": name, "beta": 20.0}, train={"steps": 60, "micro_batch": size}
        )
        toy.train(settings, backbone=toy.ToyBackbone(), source=source, say=lambda _: None)
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    rows = run(tmp_path / "cut", micro_batch)
    assert {row["share_without_preference"] for row in rows} == {0.0}
    assert rows[0]["margin"] == 0.0 and np.mean([row["accuracy"] for row in rows[-10:]]) > 0.8
    whole = run(tmp_path / "whole", 4)
    for key in ("loss", "margin", "policy_error"):
        assert [row[key] for row in rows] == pytest.approx([row[key] for row in whole], rel=1e-3, abs=1e-5)


def test_draws_of_equal_groups_are_those_of_before(tmp_path: Path) -> None:
    """All labelled: nothing is cut, so a run has the numbers that it had."""
    draws = drawn(3, torch.ones(4, 8, dtype=torch.bool), 5)
    for name, value in vars(drawn(3, None, 5)).items():
        found = vars(draws)[name]
        assert (found is None and value is None) if name == "path_step" else torch.equal(found, value)
    plain = replace(draws, members=torch.arange(8).expand(4, 8))
    assert used_members(GDRO(), torch.rand(4, 8), plain) is plain.members
