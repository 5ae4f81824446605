"""A last row that a crash tore is written again on resume, from what the checkpoint remembers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from diffalign.files.metric_rows import metrics_line, read_metrics
from diffalign.health import examine
from helpers import toy, toy_distill, toy_reward_gradient

TOYS: dict[str, Any] = {"train": toy, "distill": toy_distill, "reward_gradient": toy_reward_gradient}


def run(method: str, run_dir: Path, steps: int, **sections: Any) -> None:
    module = TOYS[method]
    sections["train"] = {"steps": steps, **sections.get("train", {})}
    config = module.toy_config(run_dir, checkpoint={"every": 3}, **sections)
    if method == "train":
        toy.train(config, backbone=toy.ToyBackbone(), source=toy.ToySource(), say=lambda _: None)
    else:
        module.run(config)


def cut(text: bytes, how: str) -> bytes:
    """Tear the end of a file, as a crash or a full disk does."""
    last = text.rstrip(b"\n").rfind(b"\n") + 1
    return {
        "half of the last row": text[: last + (len(text) - last) // 2],
        "one byte of the last row": text[: last + 1],
        "the last line's end": text[:-1],
        "the last row": text[:last],
        "zeros": text[:last] + b"\0" * (len(text) - last),
        "three rows": b"\n".join(text.splitlines()[:-3]) + b"\n",
    }[how]


HOW = ["half of the last row", "one byte of the last row", "the last line's end", "the last row", "zeros", "three rows"]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("method", TOYS)
def test_a_torn_row_is_written_again(method: str, how: str, tmp_path: Path) -> None:
    run(method, tmp_path / "straight", 9)
    run(method, tmp_path / "torn", 6)
    path = tmp_path / "torn/metrics.jsonl"
    path.write_bytes(cut(path.read_bytes(), how))
    run(method, tmp_path / "torn", 9)
    assert path.read_bytes() == (tmp_path / "straight/metrics.jsonl").read_bytes()


@pytest.mark.parametrize("log_every", [2, 5])
def test_with_rows_now_and_then(log_every: int, tmp_path: Path) -> None:
    train = {"log_every": log_every}
    run("train", tmp_path / "straight", 12, train=train)
    run("train", tmp_path / "torn", 6, train=train)
    path = tmp_path / "torn/metrics.jsonl"
    # The run of 6 steps logged its last one, which a longer run does not.
    rows = [
        line for line in path.read_text().splitlines(keepends=True) if json.loads(line)["step"] != 6 or log_every == 2
    ]
    path.write_text("".join(rows)[:-9])
    run("train", tmp_path / "torn", 12, train=train)
    kept = {row["step"]: row for row in read_metrics(path)}
    straight = {row["step"]: row for row in read_metrics(tmp_path / "straight/metrics.jsonl")}
    assert straight.items() <= kept.items()


def test_a_lost_file_begins_at_the_last_checkpoint(tmp_path: Path) -> None:
    """A checkpoint remembers the rows since the one before, and no more."""
    run("train", tmp_path, 9)
    (tmp_path / "metrics.jsonl").unlink()
    run("train", tmp_path, 12)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [7, 8, 9, 10, 11, 12]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_null(value: float, tmp_path: Path) -> None:
    line = metrics_line({"step": 1, "loss": 0.5, "grad_norm": value})
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 1, "loss": 0.5, "grad_norm": None}
    (tmp_path / "metrics.jsonl").write_text(line * 40)
    (row, *_) = read = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(row["grad_norm"]) and row["loss"] == 0.5
    examine(read)  # no check fails on it
