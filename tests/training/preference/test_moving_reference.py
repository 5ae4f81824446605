"""`tune.reference: ema`: the reference is a moving average of the policy, exact on resume, the same in every process."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from diffalign.config import TrainConfig, load_config
from diffalign.errors import DiffalignError
from diffalign.objectives import AWM, DiffusionDPO
from diffalign.pipelines import load_backbone
from diffalign.training.preference.policy import prepare_policy
from helpers import toy
from helpers.processes import command, finish, torchrun
from helpers.tiny_training import Source, config_for

EMA: dict[str, Any] = {"reference": "ema", "reference_decay": 0.8, "reference_warmup": False}


def run(run_dir: Path, steps: int = 12, **sections: Any) -> list[dict[str, float]]:
    sections["train"] = {"steps": steps, **sections.get("train", {})}
    sections.setdefault("tune", EMA)
    toy.train(
        toy.toy_config(run_dir, **sections), backbone=toy.ToyBackbone(), source=toy.ToySource(), say=lambda _: None
    )
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("keys", "decay"),
    [
        ({}, lambda t: 0.8),
        ({"reference_warmup": True}, lambda t: min(0.8, (1 + t) / (10 + t))),
        ({"reference_decay": 0.3, "reference_slope": 0.05}, lambda t: min(0.3, 0.05 * t)),
    ],
)
def test_the_reference_is_the_closed_form_of_an_average(tmp_path: Path, keys: dict[str, Any], decay: Any) -> None:
    start = {k: v.detach().numpy().astype(np.float64) for k, v in toy.ToyBackbone().trainable().items()}
    run(tmp_path, tune={**EMA, **keys}, checkpoint={"every": 1, "keep": 12})
    for step in range(12):
        folder = tmp_path / f"checkpoints/step-{step + 1:08d}"
        policy = load_file(folder / "policy.safetensors")
        for name, value in load_file(folder / "reference.safetensors").items():
            start[name] = decay(step) * start[name] + (1 - decay(step)) * policy[name]
            np.testing.assert_allclose(value, start[name], atol=1e-6)


def test_a_reference_that_keeps_nothing_is_the_policy_and_one_that_keeps_all_is_frozen(tmp_path: Path) -> None:
    at_once = run(tmp_path / "at_once", tune={**EMA, "reference_decay": 0.0})
    assert all(row["margin"] == 0.0 and row["drift"] == 0.0 for row in at_once)
    frozen, plain = run(tmp_path / "frozen", tune={**EMA, "reference_decay": 1 - 1e-12}), run(tmp_path / "b", tune={})
    assert [row["loss"] for row in frozen] == pytest.approx([row["loss"] for row in plain], rel=1e-5)
    between = run(tmp_path / "between")
    assert 0.0 < between[-1]["drift"] < 0.7 * plain[-1]["drift"]


@pytest.mark.parametrize("name", ["dpo", "nft"])
def test_resume_is_exact(tmp_path: Path, name: str) -> None:
    objective = {"name": name, "beta": 20.0 if name == "dpo" else 1.0}
    labelled: dict[str, Any] = {"objective": objective}
    source = toy.labelled(name)
    for folder, goals in (("straight", (12,)), ("resumed", (5, 12))):
        for goal in goals:
            config = toy.toy_config(
                tmp_path / folder, tune=EMA, train={"steps": goal}, checkpoint={"every": 5}, **labelled
            )
            toy.train(config, backbone=toy.ToyBackbone(), source=source, say=lambda _: None)
    for part in ("metrics.jsonl", *(f"checkpoints/step-00000012/{n}.safetensors" for n in ("policy", "reference"))):
        assert (tmp_path / "straight" / part).read_bytes() == (tmp_path / "resumed" / part).read_bytes()


def test_two_processes_have_the_same_reference(tmp_path: Path) -> None:
    sections = json.dumps({"tune": EMA})
    finish([sys.executable, *command(tmp_path / "one", 10, 4, 2), "0", sections])
    finish([*torchrun(), *command(tmp_path / "two", 10, 4, 2), "0", sections])
    finish([*torchrun(), *command(tmp_path / "resumed", 4, 4, 2), "0", sections])
    finish([*torchrun(), *command(tmp_path / "resumed", 10, 4, 2), "0", sections])
    last = "checkpoints/step-00000010/reference.safetensors"
    one, two = (load_file(tmp_path / name / last) for name in ("one", "two"))
    for key, value in one.items():
        np.testing.assert_allclose(two[key], value, rtol=1e-4, atol=1e-6)
    for part in ("metrics.jsonl", last):
        assert (tmp_path / "two" / part).read_bytes() == (tmp_path / "resumed" / part).read_bytes()


@pytest.mark.parametrize(
    ("family", "kind", "init"), [("sd3", "lora", False), ("sd15", "lora", True), ("sdxl", "full", False)]
)
def test_genuine_models(family: str, kind: str, init: bool, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Equal at first; then the reference takes the policy's place, the base stays, and only the policy is saved."""
    folder = request.getfixturevalue(f"{family}_dir")
    tune = {**EMA, "kind": kind}
    if init:
        first = load_backbone(folder)
        first.add_lora(4, 4.0)
        with torch.no_grad():
            for value in first.trainable().values():
                value.add_(0.05)
        first.save_weights(tmp_path / "lora")
        tune["init"] = str(tmp_path / "lora")
    plain = config_for(folder, tmp_path / "run", 3).model_dump(mode="json")
    config = TrainConfig.model_validate({**plain, "tune": {**plain["tune"], **tune}})
    backbone = load_backbone(folder)
    assert prepare_policy(config, backbone, AWM())
    assert list(backbone.followers()) == list(backbone.trainable())
    assert not any(value.requires_grad for value in backbone.followers().values())
    inputs = Source(backbone).batch([0])
    noisy, t = inputs.latents[0], torch.full((3,), 0.5 if backbone.process.span == 1 else 500.0)
    conditioning = {k: v.repeat_interleave(3, dim=0) for k, v in inputs.conditioning.items()}

    def predicted(role: str) -> torch.Tensor:
        with torch.no_grad(), backbone.role(role):
            return backbone.predict(noisy, t, conditioning)

    base = predicted("base")
    assert torch.equal(predicted("policy"), predicted("reference"))
    assert torch.equal(predicted("policy"), base) != init
    with torch.no_grad():
        for value in backbone.trainable().values():
            value.add_(0.01 * torch.ones_like(value))
    assert not torch.allclose(predicted("policy"), predicted("reference"), atol=1e-5)
    with torch.no_grad():
        for name, value in backbone.followers().items():
            value.copy_(backbone.trainable()[name])
    assert torch.equal(predicted("policy"), predicted("reference")) and torch.equal(predicted("base"), base)
    backbone.save_weights(tmp_path / "out")
    fresh = load_backbone(folder)
    fresh.load_weights(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(fresh.predict(noisy, t, conditioning), predicted("policy"))


def test_a_genuine_run_resumes_exactly(sd3_dir: Path, tmp_path: Path) -> None:
    for name, goals in (("straight", (4,)), ("resumed", (2, 4))):
        for goal in goals:
            backbone = load_backbone(sd3_dir)
            plain = config_for(sd3_dir, tmp_path / name, goal, optimizer={"lr": 1e-3}, checkpoint={"every": 2})
            config = plain.model_copy(update={"tune": plain.tune.model_copy(update=EMA)})
            toy.train(config, backbone=backbone, source=Source(backbone), say=lambda _: None)
    files = ["metrics.jsonl", *(f"checkpoints/step-00000004/{n}.safetensors" for n in ("policy", "reference"))]
    for part in files:
        assert (tmp_path / "straight" / part).read_bytes() == (tmp_path / "resumed" / part).read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "straight/metrics.jsonl").read_text().splitlines()]
    assert rows[0]["drift"] == 0.0 < rows[1]["drift"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective.name=sft"], "tune.reference: sft has no reference"),
        (["reference.store=r"], "reference.store: the reference is another one at every step"),
        (["tune.kind=full", "train.shard=fsdp2"], "was not shown to work with shard=fsdp2"),
        (["tune.reference=init", "tune.reference_decay=0.5"], "tune.reference_decay: it belongs to an average"),
    ],
)
def test_what_cannot_be_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(DiffalignError) as caught:
        load_config("shapes_sd3_dpo", ["tune.reference=ema", *overrides])
    assert message in str(caught.value)


def test_the_policy_alone_trains(tmp_path: Path) -> None:
    backbone = toy.ToyBackbone()
    prepare_policy(toy.toy_config(tmp_path, tune=EMA), backbone, DiffusionDPO())  # type: ignore[arg-type]
    assert not any(value.requires_grad for value in backbone.followers().values())
