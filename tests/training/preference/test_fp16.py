"""Loss scaling with skipped steps: torch's own GradScaler on the CPU, in the place of accelerate's, which needs a GPU."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from diffalign.training.preference.stabilise import is_outlier
from helpers import toy

FINE, OVERFLOWING = 2.0**8, 2.0**22
"""Scales at which the toy's gradient is finite in the first step, and at which it only is after several halvings."""


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    """accelerate keeps the precision for the whole process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def scaling(scale: float) -> Accelerator:
    accelerator = Accelerator(cpu=True)
    accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return accelerator


def run(run_dir: Path, scale: float, steps: int = 16, **train: Any) -> list[dict[str, Any]]:
    config = toy.toy_config(run_dir, train={"steps": steps, **train})
    given: dict[str, Any] = {"backbone": toy.ToyBackbone(), "source": toy.ToySource(), "say": lambda _: None}
    toy.train(config, accelerator=scaling(scale), **given)
    text = (run_dir / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text  # neither is JSON
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize(
    ("skip", "scale", "micro", "average"), list(product([None, 3.0], [FINE, OVERFLOWING], [4, 1], [None, 0.9]))
)
def test_every_pair_of_options_trains(
    tmp_path: Path, skip: float | None, scale: float, micro: int, average: float | None
) -> None:
    rows = run(tmp_path, scale, skip_grad_norm=skip, micro_batch=micro, ema_decay=average)
    overflowed = [row["grad_norm"] is None for row in rows]
    assert not any(overflowed) if scale == FINE else overflowed[0] and not overflowed[-1]
    if skip:
        assert all(row["skipped"] == 1.0 for row, over in zip(rows, overflowed, strict=True) if over)
    record = json.loads((tmp_path / "checkpoints/step-00000016/state.json").read_text())
    assert all(map(math.isfinite, record["extra"].get("usual_norms", [])))
    lost = sum(overflowed)
    assert record["scaler"]["scale"] == scale / 2**lost
    # The steps that overflowed change nothing: the weights are those of the others.
    saved = load_file(tmp_path / "weights/weights.safetensors")
    assert all(tensor.isfinite().all() for tensor in saved.values()) and saved["up"].abs().max() > 0


@pytest.mark.parametrize("scale", [FINE, OVERFLOWING])
def test_outliers_are_skipped_and_training_continues(tmp_path: Path, scale: float) -> None:
    """A factor so low that ordinary steps are outliers: the first skipped one crashed, since the scaler was not updated."""
    rows = run(tmp_path, scale, steps=30, skip_grad_norm=1.05)
    overflowed = [row["step"] for row in rows if row["grad_norm"] is None]
    skipped = [row["step"] for row in rows if row["skipped"]]
    assert [row["step"] for row in rows] == list(range(1, 31))
    assert overflowed == list(range(1, len(overflowed) + 1)) and bool(overflowed) == (scale == OVERFLOWING)
    assert set(overflowed) < set(skipped) and len(skipped) < 30
    # Ten ordinary norms come before the first one that is compared with them.
    assert min(set(skipped) - set(overflowed)) > len(overflowed) + 10


def test_losses_are_those_of_float32_within_half_precision(tmp_path: Path) -> None:
    scaled = run(tmp_path / "scaled", FINE, skip_grad_norm=3.0)
    AcceleratorState._reset_state(True)
    config = toy.toy_config(tmp_path / "plain", train={"steps": 16, "skip_grad_norm": 3.0})
    toy.train(config, backbone=toy.ToyBackbone(), source=toy.ToySource(), say=lambda _: None)
    plain = [json.loads(line) for line in (tmp_path / "plain/metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in scaled] == pytest.approx([row["loss"] for row in plain], rel=2e-2)


@pytest.mark.parametrize("norm", [math.nan, math.inf])
@pytest.mark.parametrize("known", [[], [1.0] * 5, [1.0] * 20, [math.nan] * 20])
def test_a_norm_that_is_no_number_is_an_outlier_and_never_usual(norm: float, known: list[float]) -> None:
    memory: Any = {"usual_norms": list(known)}
    assert is_outlier(norm, 3.0, memory)
    assert memory["usual_norms"] == [one for one in known if math.isfinite(one)]
