"""The run that all methods share: what one of them can, all can."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.pipelines.few_step import FewStep
from diffalign.training import finite
from diffalign.training.distillation.draws import stop_step
from diffalign.training.distillation.method import Distillation
from diffalign.training.reward_gradient.method import RewardGradient
from helpers import toy, toy_distill, toy_reward_gradient

METHODS = ("train", "distill", "reward_gradient")
VALIDATION: dict[str, Any] = {"every": 2, "prompts": "p.txt"}


def run(method: str, run_dir: Path, source: Any = None, backbone: Any = None, **given: Any) -> list[dict[str, float]]:
    """A run of a toy. `given`: say and validation (a script of scores) of the run, and sections of its config."""
    options: dict[str, Any] = {"say": given.pop("say", lambda _: None)}
    script = given.pop("script", None)
    toys: dict[str, Any] = {"train": toy, "distill": toy_distill, "reward_gradient": toy_reward_gradient}
    config, backbone = toys[method].toy_config(run_dir, **given), backbone or toys[method].ToyBackbone()
    if script is not None:
        settings = toy.toy_config(run_dir, validation={**VALIDATION, **given["validation"]}).validation
        options["validation"] = toy.Scripted(backbone, settings, [], {}, {}, 8, 0, script)
    if method == "train":
        toy.train(config, backbone=backbone, source=source or toy.ToySource(), **options)
    else:
        toys[method].run(config, backbone, source=source, **options)
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_no_longer_improves_stops_and_says_why(method: str, tmp_path: Path) -> None:
    said: list[str] = []
    given: dict[str, Any] = {"validation": {**VALIDATION, "patience": 2}, "train": {"steps": 12}}
    rows = run(method, tmp_path, say=said.append, script={2: 0.1, 4: 0.5, 6: 0.4, 8: 0.3, 10: 0.9}, **given)
    assert [row["step"] for row in rows][-1] == 8
    assert said.count("no better validation in 2 of them: stopped at step 8; best/ is step 4") == 1
    assert (tmp_path / "checkpoints/step-00000008").is_dir()
    best, last = (load_file(tmp_path / name / "weights.safetensors") for name in ("best", "weights"))
    assert best.keys() == last.keys() and any(not torch.equal(best[name], last[name]) for name in best)


@pytest.mark.parametrize(
    ("method", "remedy"),
    [
        ("train", "data.cache=all"),
        ("distill", "train.cache_prompts=true"),
        ("reward_gradient", "train.cache_prompts=true"),
    ],
)
def test_waiting_for_data_is_logged_and_said(method: str, remedy: str, tmp_path: Path) -> None:
    said: list[str] = []
    source = toy.SlowSource(toy.ToySource() if method == "train" else toy_distill.ToyPrompts(), seconds=0.03)
    run(method, tmp_path, source, say=said.append, train={"steps": 4, "log_every": 2})
    rows = [json.loads(line) for line in (tmp_path / "timing.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4] and all(0.1 < row["waiting"] < 1.0 for row in rows)
    (warning,) = [line for line in said if "of the steps' time went into reading and drawing their data" in line]
    assert remedy in warning


# --- when numbers are read ---------------------------------------------------------------------------------------------


@pytest.fixture
def lazily(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: numbers are read when a row is due."""
    monkeypatch.setattr(finite, "runs_ahead", lambda device: True)


@pytest.mark.parametrize("method", METHODS)
def test_reading_less_often_changes_no_number(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = run(method, tmp_path / "every", train={"steps": 6})
    monkeypatch.setattr(finite, "runs_ahead", lambda device: True)
    seldom = run(method, tmp_path / "seldom", train={"steps": 6, "log_every": 4})
    assert seldom == [row for row in every if row["step"] in (4, 6)]
    a, b = (load_file(tmp_path / name / "weights/weights.safetensors") for name in ("every", "seldom"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def broken(method: str) -> Any:
    """A source of which one row is no number."""
    if method == "train":
        groups = toy.ToySource()
        groups.latents[5] = float("nan")
        return groups
    prompts = toy_distill.ToyPrompts()
    prompts.prompts[5] = float("nan")
    return prompts


@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_finite_is_found_before_anything_is_written(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named by the step and the group or prompt in which it came up first, though all later steps are not finite either."""
    messages = []
    for name, log_every in (("eager", 1), ("lazy", 100)):
        monkeypatch.setattr(finite, "runs_ahead", lambda device, name=name: name == "lazy")
        with pytest.raises(DiffalignError) as caught:
            run(method, tmp_path / name, broken(method), train={"steps": 12, "log_every": log_every})
        messages.append(str(caught.value).replace(name, ""))
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        assert all(np.isfinite(row["grad_norm"]) for row in map(json.loads, lines))
    assert messages[0] == messages[1]
    what = {"train": "loss", "distill": "fake network's loss", "reward_gradient": "loss"}[method]
    names = "groups g5;" if method == "train" else "prompts p5;"
    assert f"the {what} is nan at step " in messages[0] and f", {names} the last good checkpoint is " in messages[0]
    saved = [sorted(path.name for path in (tmp_path / name / "checkpoints").glob("*")) for name in ("eager", "lazy")]
    assert saved[0] == saved[1]


class Elsewhere:
    """On torch's meta device, whose tensors hold no numbers: reading one, or branching on one, is an error."""

    device = torch.device("meta")
    trunk: Any

    def __init__(self) -> None:
        super().__init__()
        self.trunk.to("meta")

    def predict(self, noisy: Tensor, t: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        prediction: Tensor = self.trunk(noisy, conditioning["prompt"].to("meta"), t.to("meta"))
        return prediction


class Student(Elsewhere, toy_distill.ToyBackbone): ...


class Policy(Elsewhere, toy_reward_gradient.ToyBackbone): ...


@pytest.mark.parametrize("method", ["distill", "refl", "draft_lv"])
def test_no_number_is_read_inside_a_step(
    method: str, tmp_path: Path, lazily: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of distillation with a critic, rewards and PPO, and of reward gradients; test_reading.py has that of preferences."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # it knows no meta device
    accelerator, optimizer = Accelerator(cpu=True), {"name": "adafactor"}  # AdamW's fused kernel knows none either
    trained: Any
    if method == "distill":
        config = toy_distill.toy_config(
            tmp_path, optimizer=optimizer, fake={"updates": 2, "optimizer": optimizer}, group={"size": 4},
            gan={"weight": 0.5, "hidden": 8, "real": "toy"},
            reward={"terms": [{"name": "mean"}], "policy_weight": 2.0, "policy_clip": 0.1, "policy_reuse": 2},
        )  # fmt: skip
        student = FewStep(toy_distill.ToyBackbone().process, toy_distill.TIMES)
        trained = Distillation(
            config, Student(), student, toy_distill.ToyPrompts(), toy.SHAPE, accelerator,
            scores=toy_distill.brightness, real=toy_distill.ToyImages(),
        )  # fmt: skip
    else:
        settings = {"name": method, **({"between": [2, 4]} if method == "refl" else {"noises": 2})}
        followed = toy_reward_gradient.toy_config(tmp_path, optimizer=optimizer, method=settings, drift={"weight": 0.1})
        trained = RewardGradient(
            followed, Policy(), toy_distill.ToyPrompts(), toy.SHAPE, toy_reward_gradient.bright, accelerator
        )
    for step in range(4):
        trained.step(step)
    for read in (trained.row, trained.finite.check):  # an error there, so the lines above read nothing
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
            read()


# --- the average -------------------------------------------------------------------------------------------------------


def test_the_average_is_taken_after_all_updates_of_a_step(tmp_path: Path) -> None:
    """Those by PPO on the same roll-outs included."""
    sections: dict[str, Any] = {
        "reward": {"terms": [{"name": "mean"}], "policy_weight": 2.0, "policy_clip": 0.1, "policy_reuse": 2},
        "group": {"size": 4},
        "train": {"steps": 1, "ema_decay": 0.75, "ema_warmup": False},
    }
    configs = (toy_distill.toy_config(tmp_path, seed=seed, **sections) for seed in range(20))
    config = next(
        one for one in configs if stop_step(one, 0) < 3
    )  # the last step draws nothing, so PPO has no say there
    backbone = toy_distill.ToyBackbone()
    start = {name: value.detach().clone() for name, value in backbone.trainable().items()}
    toy_distill.run(config, backbone, scores=toy_distill.brightness)
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row["ratio_change"] > 0  # there were such updates
    policy, average = (
        load_file(tmp_path / f"checkpoints/step-00000001/{name}.safetensors") for name in ("policy", "ema")
    )
    for name, value in start.items():
        torch.testing.assert_close(average[name], value + 0.25 * (policy[name] - value))
