"""The trainer under group objectives: which images a step sees, labels that are missing, and committed trajectories."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffalign.objectives import GDRO, SFT, DiffusionDPO
from diffalign.pipelines import load_backbone
from diffalign.pipelines.process import Flow
from diffalign.training.preference.draws import make_draws
from diffalign.training.preference.step import used_members
from helpers import toy
from helpers.tiny_training import TRAJECTORIES, Source, config_for

OBJECTIVES: dict[str, dict[str, Any]] = {
    "rankdpo": {"name": "rankdpo", "beta": 20.0},
    "rankdpo-lipo": {"name": "rankdpo", "beta": 20.0, "ranked_by": "model"},
    "smpo": {"name": "smpo", "beta": 20.0, "gamma": 10.0},
    "gdro": {"name": "gdro", "beta": 20.0, "tau": 0.1, "gamma": 0.05},
    "gdro-ranks": {"name": "gdro", "beta": 20.0, "tau": 0.0, "gamma": 0.0},
}


def shares(source: toy.ToySource) -> toy.ToySource:
    """Labels in [0, 1] in the order of the rewards."""
    places = source.rewards.argsort(dim=1).argsort(dim=1)
    source.rewards = places / (source.rewards.shape[1] - 1)
    return source


def run(run_dir: Path, source: Any = None, **sections: Any) -> list[dict[str, float]]:
    config = toy.toy_config(run_dir, **sections)
    toy.train(config, backbone=toy.ToyBackbone(), source=source or shares(toy.ToySource()), say=lambda _: None)
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_learns_the_order(name: str, tmp_path: Path) -> None:
    rows = run(tmp_path, objective=OBJECTIVES[name], train={"steps": 60})
    assert rows[0]["margin"] == 0.0 and rows[0]["accuracy"] == 0.5 and rows[0]["drift"] == 0.0
    assert np.mean([r["accuracy"] for r in rows[-10:]]) > 0.75
    if "implicit_spread" in rows[0]:
        assert rows[0]["implicit_spread"] == 0.0 < rows[-1]["implicit_spread"]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_missing_labels_and_images_cost_weight_and_nothing_else(name: str, tmp_path: Path) -> None:
    """NaN labels, smaller groups, a group of ties: no NaN reaches the loss, and the share is logged.

    A group with two labels that differ counts, whatever it lacks; one of ties, of one label or masked out does not.
    """
    source = shares(toy.ToySource())
    source.rewards[0, 1] = float("nan")
    source.rewards[1, 2:], source.mask[1] = float("nan"), False
    source.rewards[2] = 0.5
    source.rewards[3, 1:] = float("nan")
    source.rewards[4, 2:] = float("nan")
    rows = run(tmp_path, source=source, objective=OBJECTIVES[name], train={"steps": 13})
    assert all(np.isfinite(r["loss"]) and np.isfinite(r["margin"]) for r in rows)
    assert np.mean([r["share_without_preference"] for r in rows]) == pytest.approx(3 / 13)


def test_two_of_a_group_make_rankdpo_a_weighted_dpo(tmp_path: Path) -> None:
    """K = 2 with shares 1 and 0: RankDPO's loss is 0.5325 of DPO's with twice the beta, gradient and all."""
    pairs = [shares(toy.ToySource(members=2)) for _ in range(2)]
    ranked = run(tmp_path / "a", source=pairs[0], objective={"name": "rankdpo", "beta": 20.0}, train={"steps": 1})
    plain = run(tmp_path / "b", source=pairs[1], objective={"name": "dpo", "beta": 40.0}, train={"steps": 1})
    for name in ("loss", "grad_norm"):
        assert ranked[0][name] == pytest.approx(0.5324558 * plain[0][name], rel=1e-5)


def draws_of(step: int, size: int | None, groups: int = 6, **sections: Any) -> Any:
    config = toy.toy_config(Path("x"), data={"group_size": size}, **sections)
    ids = [f"g{i}" for i in range(groups)]
    return make_draws(config, Flow(), step, list(range(groups)), ids, torch.Size((groups, 8, *toy.SHAPE)))


def test_a_group_is_drawn_anew_each_time_it_comes_up() -> None:
    first, again, other = draws_of(0, 3), draws_of(0, 3), draws_of(1, 3)
    assert first.members.shape == (6, 3) and torch.equal(first.members, again.members)
    assert not torch.equal(first.members, other.members)
    assert all(len(set(row.tolist())) == 3 for row in first.members)
    # Over many steps every image comes up as often as the others.
    counts = torch.stack([draws_of(s, 3).members for s in range(200)]).flatten().bincount(minlength=8)
    assert counts.sum() == 3600 and int((counts - 450).abs().max()) < 5 * (450 * (1 - 3 / 8)) ** 0.5
    assert draws_of(0, None).members.tolist() == [list(range(8))] * 6
    for name in ("noise", "times", "order"):  # the choice leaves the other draws as they were
        assert torch.equal(vars(first)[name], vars(draws_of(0, None))[name])


def test_stratified_times_cover_the_density_in_every_step() -> None:
    """One group in each of groups_per_step parts, whatever its micro-batch; without, the draw is what it was."""
    config = toy.toy_config(Path("x"), train={"groups_per_step": 6, "micro_batch": 6}, times={"stratified": True})
    shape = torch.Size((2, 4, *toy.SHAPE))
    for step in range(5):
        times = torch.cat(
            [make_draws(config, Flow(), step, s, ["g0", "g1"], shape).times for s in ([0, 1], [2, 3], [4, 5])]
        )
        assert (times * 6).floor().tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert not torch.equal(times, draws_of(4, None).times)


def test_objectives_rank_within_the_drawn_images() -> None:
    draws = draws_of(3, 4)
    rewards = torch.rand(6, 8, generator=torch.Generator().manual_seed(0))
    within = rewards.gather(1, draws.members)
    assert torch.equal(used_members(GDRO(), rewards, draws), draws.members)
    pair = rewards.gather(1, used_members(DiffusionDPO(), rewards, draws))
    assert torch.equal(pair, torch.stack([within.amax(1), within.amin(1)], dim=1))
    assert torch.equal(rewards.gather(1, used_members(SFT(), rewards, draws))[:, 0], within.amax(1))


def test_the_drawn_images_decide_whether_there_is_a_preference(tmp_path: Path) -> None:
    """One success among four: a pair holds it half of the time, and otherwise has nothing to say."""
    source = toy.ToySource()
    source.rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0]]).repeat(13, 1)
    rows = run(tmp_path, source=source, objective=OBJECTIVES["gdro"], data={"group_size": 2}, train={"steps": 200})
    assert np.mean([r["share_without_preference"] for r in rows]) == pytest.approx(0.5, abs=0.06)


def test_subsets_resume_exactly(tmp_path: Path) -> None:
    options: dict[str, Any] = {"objective": OBJECTIVES["gdro"], "data": {"group_size": 3}}
    straight = run(tmp_path / "a", **options)
    run(tmp_path / "b", train={"steps": 8}, **options)
    assert run(tmp_path / "b", **options) == straight


@pytest.mark.parametrize(
    ("family", "name", "sections"),
    [
        ("sd3", "rankdpo", {}),
        ("sdxl", "smpo", {"noise": "inverted", "inversion": {"steps": 4}}),
        ("sd3", "gdro", {"data": {"group_size": 2}}),
    ],
)
def test_trajectory_is_the_committed_one(
    family: str, name: str, sections: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Loss and gradient norm of a short run. They change only with the mathematics; DIFFALIGN_UPDATE=1 writes them anew."""
    folder = request.getfixturevalue(f"{family}_dir")
    backbone = load_backbone(folder)
    objective = OBJECTIVES[name] | {"beta": 200.0}
    plain = config_for(folder, tmp_path, 6, optimizer={"lr": 1e-3}, **sections)
    config = type(plain).model_validate({**plain.model_dump(mode="json"), "objective": objective})
    toy.train(config, backbone=backbone, source=Source(backbone), say=lambda _: None)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    trajectory = {key: [row[key] for row in rows] for key in ("loss", "grad_norm")}
    path = TRAJECTORIES / f"{family}_{name}.json"
    if os.environ.get("DIFFALIGN_UPDATE"):
        path.write_text(json.dumps(trajectory, indent=1) + "\n")
    committed = json.loads(path.read_text())
    for key, values in trajectory.items():
        assert values == pytest.approx(committed[key], rel=1e-4), key
