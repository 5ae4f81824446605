"""Pairs whose loser the reference prefers: counted, followed in both halves, and named where they are not learnt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffalign.config import load_config
from diffalign.errors import DiffalignError
from diffalign.health import examine
from diffalign.objectives import GroupErrors
from diffalign.training.preference.disagreement import halves, within_halves
from helpers import toy


def test_halves_by_hand() -> None:
    """Pairs: reference wrong and turned; wrong and not; right and kept; right and lost. The middle image is no matter."""
    policy = torch.tensor([[0.1, 0.9, 0.2], [0.3, 0.0, 0.2], [0.1, 0.5, 0.4], [0.5, 0.5, 0.4]], dtype=torch.float64)
    reference = torch.tensor([[0.3, 0.9, 0.2], [0.4, 0.0, 0.2], [0.2, 0.5, 0.3], [0.2, 0.5, 0.3]], dtype=torch.float64)
    labels = torch.tensor([[1.0, 0.5, 0.0]], dtype=torch.float64).repeat(4, 1)
    found = halves(GroupErrors(policy, reference, labels))
    assert found["reference_disagrees"].tolist() == [1, 1, 0, 0]
    assert found["disagreeing_gap"].tolist() == pytest.approx([0.2, 0.1, 0, 0])
    assert found["agreeing_gap"].tolist() == pytest.approx([0, 0, 0.2, -0.2])
    assert found["disagreeing_turned"].tolist() == [1, 0, 0, 0] and found["agreeing_lost"].tolist() == [0, 0, 0, 1]
    means = {name: float(value.mean()) for name, value in found.items()}
    row = within_halves({**means, "loss": 0.3})
    assert row["disagreeing_gap"] == pytest.approx(0.15) and row["agreeing_gap"] == pytest.approx(0.0)
    assert row["disagreeing_turned"] == row["agreeing_lost"] == 0.5 and row["loss"] == 0.3
    whole = within_halves({**means, "reference_disagrees": 1.0})
    assert whole["agreeing_gap"] == 0.0 and whole["disagreeing_gap"] == pytest.approx(0.075)
    assert within_halves({"loss": 0.3}) == {"loss": 0.3}


def run(run_dir: Path, **sections: Any) -> list[dict[str, float]]:
    config = toy.toy_config(run_dir, train={"steps": 40, **sections.pop("train", {})}, **sections)
    toy.train(config, backbone=toy.ToyBackbone(), source=toy.ToySource(), say=lambda _: None)
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_in_the_trainer(tmp_path: Path) -> None:
    rows = run(tmp_path / "one")
    assert rows[0].get("disagreeing_gap", 0.0) == rows[0].get("agreeing_gap", 0.0) == 0.0
    assert rows[0].get("disagreeing_turned", 0.0) == 0.0
    shares = [row["reference_disagrees"] for row in rows]
    assert 0.0 < np.mean(shares) < 1.0 and all(share * 4 == round(share * 4) for share in shares)
    for row in rows:  # both halves together are what the losses see
        parts = row["reference_disagrees"], 1 - row["reference_disagrees"]
        both = parts[0] * row.get("disagreeing_gap", 0.0) + parts[1] * row.get("agreeing_gap", 0.0)
        assert both == pytest.approx(row["loser_gap"] - row["winner_gap"], abs=1e-6)
    small = run(tmp_path / "small", train={"micro_batch": 1})
    assert [row["reference_disagrees"] for row in small] == shares
    assert "reference_disagrees" not in run(tmp_path / "free", objective={"name": "simpo", "beta": 1.0})[0]


def test_the_finding() -> None:
    def made(wrong: float, right: float, noise: float) -> list[dict[str, float]]:
        rng = np.random.default_rng(0)
        return [
            {
                "step": step, "reference_disagrees": 0.4, "disagreeing_gap": wrong + noise * rng.standard_normal(),
                "agreeing_gap": right + noise * rng.standard_normal(),
            }
            for step in range(1, 61)
        ]  # fmt: skip

    (finding,) = [f for f in examine(made(-0.01, 0.02, 0.005)) if f.name == "reference_disagrees"]
    assert "40% of the pairs; gap -0.0" in finding.measured and finding.words.level == "note"
    for wrong, right, noise in ((0.01, 0.02, 0.005), (-0.01, 0.02, 0.5), (-0.01, -0.02, 0.005)):
        assert not [f for f in examine(made(wrong, right, noise)) if f.name == "reference_disagrees"]


def test_a_drift_bound_holds_the_policy(tmp_path: Path) -> None:
    """Nothing changes within the radius; beyond it the loss has the weighted excess, and the policy stays nearer."""
    free = run(tmp_path / "free")
    wide = run(tmp_path / "wide", train={"drift_weight": 50.0, "drift_radius": 1e6})
    for one, other in zip(free, wide, strict=True):
        assert {k: v for k, v in other.items() if k != "drift_excess"} == one and other["drift_excess"] == 0.0
    radius = free[-1]["drift"] / 4
    bound = run(tmp_path / "bound", train={"drift_weight": 50.0, "drift_radius": radius})
    assert bound[-1]["drift"] < 0.5 * free[-1]["drift"]
    first = next(at for at, row in enumerate(bound) if row["drift_excess"] > 0)
    assert [row["loss"] for row in bound[:first]] == [row["loss"] for row in free[:first]]
    assert bound[first]["loss"] == pytest.approx(free[first]["loss"] + 50 * bound[first]["drift_excess"], rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.drift_radius=0.1"], "train.drift_radius: a radius does nothing without a weight"),
        (["train.drift_weight=1", "objective.name=sft"], "train.drift_weight: sft has no reference to drift from"),
        (["train.drift_weight=1", "reference.store=r"], "the drift needs the reference's predictions"),
    ],
)
def test_a_drift_bound_that_cannot_be(overrides: list[str], message: str) -> None:
    with pytest.raises(DiffalignError) as caught:
        load_config("shapes_sd3_dpo", overrides)
    assert message in str(caught.value)
