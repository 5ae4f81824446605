"""The moving average of the weights: its decay in closed form, computed with numpy from the weights of every step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from diffalign.errors import DiffalignError
from diffalign.training.average_decay import AverageDecay
from helpers import toy, toy_distill, toy_reward_gradient

STEPS = 30


def decay(t: int, largest: float, warmup: bool, slope: float | None) -> float:
    limits = [largest, (1 + t) / (10 + t) if warmup else 1.0, slope * t if slope is not None else 1.0]
    return min(limits)


SCHEDULES: list[tuple[dict[str, Any], tuple[float, bool, float | None]]] = [
    ({"ema_decay": 0.9999}, (0.9999, True, None)),
    ({"ema_decay": 0.5}, (0.5, True, None)),
    ({"ema_decay": 0.9, "ema_warmup": False}, (0.9, False, None)),
    ({"ema_decay": 0.5, "ema_warmup": False, "ema_slope": 0.02}, (0.5, False, 0.02)),
    ({"ema_decay": 0.9, "ema_slope": 0.01}, (0.9, True, 0.01)),
]


@pytest.mark.parametrize(("keys", "schedule"), SCHEDULES)
def test_the_average_is_its_closed_form(
    tmp_path: Path, keys: dict[str, Any], schedule: tuple[float, bool, float | None]
) -> None:
    """a_n = sum over steps of (1 - d_t) prod of later d times the weights after step t, and prod of all d times the start."""
    config = toy.toy_config(tmp_path, train={"steps": STEPS, **keys}, checkpoint={"every": 1, "keep": STEPS})
    backbone = toy.ToyBackbone()
    start = {name: value.detach().numpy().astype(np.float64) for name, value in backbone.trainable().items()}
    start = {name: value.copy() for name, value in start.items()}
    toy.train(config, backbone=backbone, source=toy.ToySource(), say=lambda _: None)
    decays = np.array([decay(t, *schedule) for t in range(STEPS)])
    for last in (1, 2, 11, STEPS):
        folders = [tmp_path / f"checkpoints/step-{n:08d}" for n in range(1, last + 1)]
        later = np.array([np.prod(decays[t + 1 : last]) for t in range(last)])
        for name, first in start.items():
            expected = np.prod(decays[:last]) * first
            for t, folder in enumerate(folders):
                expected += (1 - decays[t]) * later[t] * load_file(folder / "policy.safetensors")[name]
            np.testing.assert_allclose(load_file(folders[-1] / "ema.safetensors")[name], expected, atol=1e-6)


def test_published_values() -> None:
    """(1 + n) / (10 + n) capped at 0.9 (flow_grpo), and GDRO's min(0.001 i, 0.5)."""
    flow_grpo = AverageDecay(0.9)
    assert [round(flow_grpo.at(n), 6) for n in (7, 70, 71, 80, 500)] == [0.470588, 0.8875, 0.888889, 0.9, 0.9]
    gdro = AverageDecay(0.5, warmup=False, slope=0.001)
    assert [gdro.at(i) for i in (100, 300, 500, 900)] == pytest.approx([0.1, 0.3, 0.5, 0.5])


def test_share_of_the_start() -> None:
    assert AverageDecay(0.999, warmup=False).share_of_start(400) == pytest.approx(0.999**400)
    assert AverageDecay(0.9999).share_of_start(40) == pytest.approx(
        np.prod([(1 + t) / (10 + t) for t in range(40)]), abs=1e-8
    )
    assert AverageDecay(0.5, warmup=False, slope=0.001).share_of_start(3) == 0.0


@pytest.mark.parametrize("module", [toy, toy_distill, toy_reward_gradient], ids=lambda module: module.__name__[-8:])
def test_forty_steps_at_a_usual_decay_save_what_was_trained(tmp_path: Path, module: Any) -> None:
    """In every trainer: 0.9999, diffusers' usual decay, saved the base within 0.3% before there was a warm-up."""
    config = module.toy_config(tmp_path, train={"steps": 40, "ema_decay": 0.9999})
    backbone = module.ToyBackbone()
    start = {name: value.detach().numpy().copy() for name, value in backbone.trainable().items()}
    if module is toy:
        toy.train(config, backbone=backbone, source=toy.ToySource(), say=lambda _: None)
    else:
        module.run(config, backbone)
    average, trained = (
        load_file(tmp_path / f"checkpoints/step-00000040/{name}.safetensors") for name in ("ema", "policy")
    )
    kept, moved = (sum(np.abs(one[name] - start[name]).sum() for name in start) for one in (average, trained))
    assert 0.4 < kept / moved < 1.6


def test_a_slope_needs_an_average(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="it limits ema_decay, which is null"):
        toy.toy_config(tmp_path, train={"ema_slope": 0.001})


def test_an_average_resumes(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"ema_decay": 0.5, "ema_slope": 0.01}
    for name, legs in (("straight", (12,)), ("resumed", (5, 12))):
        for steps in legs:
            config = toy.toy_config(tmp_path / name, train={"steps": steps, **keys})
            toy.train(config, backbone=toy.ToyBackbone(), source=toy.ToySource(), say=lambda _: None)
    a, b = (load_file(tmp_path / name / "weights/weights.safetensors") for name in ("straight", "resumed"))
    assert all(np.array_equal(a[key], b[key]) for key in a)
    with pytest.raises(DiffalignError, match="train.ema_slope was 0.01, is now 0.02"):
        config = toy.toy_config(tmp_path / "straight", train={"steps": 12, **keys, "ema_slope": 0.02})
        toy.train(config, backbone=toy.ToyBackbone(), source=toy.ToySource(), say=lambda _: None)
