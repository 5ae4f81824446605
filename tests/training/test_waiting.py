"""When a step's numbers reach the host, how long steps wait for data, and that neither grows with the dataset."""

from __future__ import annotations

import json
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffalign.config import TrainConfig
from diffalign.errors import DiffalignError
from diffalign.objectives import OBJECTIVES
from diffalign.training import finite as reading
from diffalign.training.device import to_device
from diffalign.training.order import BucketOrder
from diffalign.training.preference import method
from diffalign.training.preference.draws import make_draws
from diffalign.training.preference.step import preference_step
from diffalign.training.progress import Pace
from helpers import toy


class Elsewhere(toy.ToyBackbone):
    """On torch's meta device, whose tensors hold no numbers: reading one, or branching on one, is an error."""

    device = torch.device("meta")

    def __init__(self) -> None:
        super().__init__()
        self.trunk.to("meta")


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("images", [None, 3])
def test_no_number_is_read_inside_a_step(name: str, images: int | None, tmp_path: Path) -> None:
    """Forward, loss, backward, clipping and the update, for every objective, with and without passes."""
    plain = toy.toy_config(tmp_path, train={"prompt_dropout": 0.3}, error_space="epsilon").model_dump(mode="json")
    config = TrainConfig.model_validate({**plain, "objective": {"name": name}})
    backbone, source = Elsewhere(), toy.labelled(name)
    parameters = list(backbone.trainable().values())
    optimizer = torch.optim.AdamW(parameters)
    batch = source.batch([0, 1, 2])
    draws = make_draws(config, backbone.process, 0, [0, 1, 2], batch.group_ids, batch.latents.shape)
    objective = OBJECTIVES[name]()
    result = preference_step(
        config, objective, backbone, batch, draws, source.unconditional, None, images_per_pass=images
    )
    share = (to_device(torch.ones(3), backbone.device) * result.weight * result.output.loss).sum()
    watched = reading.FiniteGuard(torch.device("cuda"), tmp_path, "groups", "lower optimizer.lr")
    watched.loss(0, batch.group_ids, result.output.loss, share)
    share.backward()
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    watched.norm(0, batch.group_ids, norm)
    optimizer.step()
    assert all(value.device.type == "meta" for value in result.metrics.values())
    with pytest.raises(RuntimeError, match="meta"):  # reading is an error there, so the lines above read nothing
        watched.check()


def lazily(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, source: Any = None, **sections: Any
) -> list[dict[str, float]]:
    """As on a GPU: numbers are read when a row is due."""
    monkeypatch.setattr(reading, "runs_ahead", lambda device: True)
    try:
        return eagerly(run_dir, source, **sections)
    finally:
        monkeypatch.undo()


def eagerly(run_dir: Path, source: Any = None, **sections: Any) -> list[dict[str, float]]:
    config = toy.toy_config(run_dir, **sections)
    toy.train(config, backbone=toy.ToyBackbone(), source=source or toy.ToySource(), say=lambda _: None)
    return read(run_dir / "metrics.jsonl")


def read(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_reading_less_often_changes_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = eagerly(tmp_path / "every")
    counted: list[int] = []
    logged = method.logged
    monkeypatch.setattr(method, "logged", lambda *given: counted.append(1) or logged(*given))
    seldom = lazily(tmp_path / "seldom", monkeypatch, train={"log_every": 5})
    assert seldom == [row for row in every if row["step"] in (5, 10, 12)]
    assert len(counted) == 3
    assert (tmp_path / "every/weights/weights.safetensors").read_bytes() == (
        tmp_path / "seldom/weights/weights.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("log_every", [1, 100])
def test_what_is_not_finite_is_found_before_anything_is_written(
    log_every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named by the step and group in which it came up first, though all later steps are not finite either."""
    source = toy.ToySource()
    source.latents[5] = float("nan")
    messages = []
    for name, run in (("eager", eagerly), ("lazy", lazily)):
        options = {} if run is eagerly else {"monkeypatch": monkeypatch}
        with pytest.raises(DiffalignError, match=r"the loss is nan at step \d+, groups g5; the last good") as caught:
            run(tmp_path / name, source=source, train={"log_every": log_every, "steps": 12}, **options)
        messages.append(str(caught.value).replace(name, ""))
        assert all(np.isfinite(row["loss"]) for row in read(tmp_path / name / "metrics.jsonl"))
    assert messages[0] == messages[1]
    saved = [sorted(path.name for path in (tmp_path / name / "checkpoints").glob("*")) for name in ("eager", "lazy")]
    assert saved[0] == saved[1]


def test_a_gradient_that_is_not_finite_is_named(tmp_path: Path) -> None:
    watched = reading.FiniteGuard(torch.device("cuda"), tmp_path, "groups", "lower optimizer.lr")
    for step, value in enumerate((1.0, float("inf"), float("nan"))):
        watched.loss(step, ["a"], torch.tensor([1.0]), torch.tensor(1.0))
        watched.norm(step, ["a", "b"], torch.tensor(value))
    with pytest.raises(DiffalignError, match="the gradient norm is inf at step 2, groups a, b"):
        watched.check()
    watched.check()  # said once


def test_waiting_is_logged_and_said(tmp_path: Path) -> None:
    class Slow(toy.ToySource):
        def batch(self, indices: list[int]) -> toy.Batch:
            torch.zeros(1)
            stop = clock() + 0.02
            while clock() < stop:
                pass
            return super().batch(indices)

    from time import monotonic as clock

    said: list[str] = []
    config = toy.toy_config(tmp_path, train={"steps": 6, "log_every": 2})
    toy.train(config, backbone=toy.ToyBackbone(), source=Slow(), say=said.append)
    rows = read(tmp_path / "timing.jsonl")
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert all(0.3 < row["waiting"] < 1.0 and row["seconds"] > 0.02 and row["peak_gib"] > 0 for row in rows)
    assert sum("of the steps' time went into reading and drawing their data" in line for line in said) == 1


def test_pace_is_the_mean_since_the_last_row() -> None:
    pace = Pace("a fast disk shortens it")
    for seconds, waited in ((1.0, 0.0), (3.0, 0.04)):
        pace.add(seconds, waited)
    row = pace.row()
    assert (row["seconds"], row["waiting"]) == (2.0, 0.01)
    assert pace.waiting_warning() is None
    pace.add(1.0, 0.07)
    assert pace.row()["waiting"] == 0.07
    assert (pace.waiting_warning() or "").startswith("2.2% of the steps' time")


# --- the dataset's size ----------------------------------------------------------------------------------------


def work_of_steps(groups: int, buckets: int) -> tuple[int, int]:
    """Calls made and bytes allocated by choosing the groups of 40 steps, once an epoch's order is there."""
    order = BucketOrder((np.arange(groups) % buckets).tolist(), 2, 8, 0)
    first = (
        groups // 16
    )  # half an epoch in: with several buckets, every permutation of the epoch has been drawn by then
    for step in range(first - 60, first):
        order.step(step)
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    tracemalloc.start()
    sys.setprofile(count)
    for step in range(first, first + 40):
        order.step(step)
    sys.setprofile(None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return calls, peak


@pytest.mark.parametrize("buckets", [1, 3])
def test_a_step_does_as_much_among_a_million_groups(buckets: int) -> None:
    few, many = work_of_steps(3_000, buckets), work_of_steps(999_000, buckets)
    assert many[0] == pytest.approx(few[0], rel=0.02)
    assert many[1] < few[1] + 10_000  # an array over the units of an epoch would be a megabyte
