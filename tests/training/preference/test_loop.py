"""The loop's invariants, on the toy backbone: how a step is cut up cannot change it."""

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffalign.errors import DiffalignError
from diffalign.training import checkpoint
from diffalign.training.optim import learning_rate
from helpers import toy


def run(run_dir: Path, source: Any = None, **sections: Any) -> list[dict[str, float]]:
    toy.train(
        toy.toy_config(run_dir, **sections),
        backbone=toy.ToyBackbone(),
        source=source or toy.ToySource(),
        say=lambda _: None,
    )
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def column(rows: list[dict[str, float]], name: str) -> list[float]:
    return [row[name] for row in rows]


def test_starts_at_the_reference_and_learns(tmp_path: Path) -> None:
    rows = run(tmp_path, train={"steps": 60})
    assert (
        rows[0]["margin"] == 0.0
        and rows[0]["loss"] == pytest.approx(np.log(2), rel=1e-6)
        and rows[0]["accuracy"] == 0.5
    )
    assert np.mean(column(rows[-10:], "accuracy")) > 0.8
    assert rows[0]["drift"] == 0.0 and rows[-1]["drift"] > 0


def test_micro_batches_change_nothing(tmp_path: Path) -> None:
    whole, cut = run(tmp_path / "a"), run(tmp_path / "b", train={"micro_batch": 1})
    assert cut[0]["grad_norm"] == pytest.approx(whole[0]["grad_norm"], rel=1e-5)
    for name in ("loss", "grad_norm", "policy_error"):
        assert column(cut, name) == pytest.approx(column(whole, name), rel=1e-4)


def test_groups_without_preference_have_no_weight(tmp_path: Path) -> None:
    source = toy.ToySource()
    source.rewards[::2] = 0.5
    source.mask[1] = False
    rows = run(tmp_path, source=source, train={"steps": 13})  # four epochs of 13 groups: every group counts alike
    assert np.mean(column(rows, "share_without_preference")) == pytest.approx(8 / 13)
    assert rows[0]["loss"] < np.log(2)  # the divisor is the groups drawn, not those that count


def test_only_labels_matter_for_weights(tmp_path: Path) -> None:
    source = toy.ToySource()
    source.rewards[:] = 1.0
    rows = run(tmp_path, source=source)
    assert set(column(rows, "loss")) == {0.0} and set(column(rows, "grad_norm")) == {0.0}


def test_independent_noise_and_prompt_dropout_are_other_draws(tmp_path: Path) -> None:
    plain = column(run(tmp_path / "a"), "policy_error")
    assert column(run(tmp_path / "b", noise="independent"), "policy_error") != plain
    assert column(run(tmp_path / "c", train={"prompt_dropout": 0.5}), "policy_error") != plain
    assert column(run(tmp_path / "d", error_space="epsilon"), "policy_error") != plain


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "adamw8bit"])
def test_resume_is_exact(tmp_path: Path, optimizer: str) -> None:
    options: dict[str, Any] = {"optimizer": {"name": optimizer, "lr": 1e-2}}
    straight = run(tmp_path / "a", train={"steps": 12, "ema_decay": 0.9}, **options)
    run(tmp_path / "b", train={"steps": 6, "ema_decay": 0.9}, **options)
    resumed = run(tmp_path / "b", train={"steps": 12, "ema_decay": 0.9}, **options)
    assert resumed == straight
    for name in ("policy", "optimizer", "ema"):
        a, b = (load_file(tmp_path / d / f"checkpoints/step-00000012/{name}.safetensors") for d in "ab")
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    a, b = (load_file(tmp_path / d / "weights/weights.safetensors") for d in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_rows_after_the_checkpoint_are_cut(tmp_path: Path) -> None:
    straight = run(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 13, "loss": 9.9}\n{"step": 14, "lo')
    assert run(tmp_path) == straight


def test_only_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    run(tmp_path, checkpoint={"every": 2, "keep": 3})
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == [f"step-{n:08d}" for n in (8, 10, 12)]


def test_average_is_what_is_saved(tmp_path: Path) -> None:
    run(tmp_path, train={"ema_decay": 0.5})
    saved = load_file(tmp_path / "weights/weights.safetensors")
    average = load_file(tmp_path / "checkpoints/step-00000012/ema.safetensors")
    last = load_file(tmp_path / "checkpoints/step-00000012/policy.safetensors")
    assert torch.equal(saved["up"], average["up"]) and not torch.equal(saved["up"], last["up"])


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"seed": 1}, "seed"),
        ({"objective": {"name": "dpo", "beta": 21.0}}, "objective.beta"),
        ({"noise": "independent"}, "noise"),
    ],
)
def test_checkpoint_of_another_config(tmp_path: Path, change: dict[str, Any], key: str) -> None:
    run(tmp_path, train={"steps": 4})
    with pytest.raises(DiffalignError, match=f"belongs to another config: {key} was"):
        run(tmp_path, **change)


def test_steps_may_not_go_back(tmp_path: Path) -> None:
    run(tmp_path, train={"steps": 8})
    with pytest.raises(DiffalignError, match="has 8 steps already"):
        run(tmp_path, train={"steps": 4})


def test_not_finite_stops_with_names(tmp_path: Path) -> None:
    run(tmp_path, train={"steps": 4})
    source = toy.ToySource()
    source.latents[5] = float("nan")
    with pytest.raises(
        DiffalignError, match=r"the loss is nan at step \d+, groups g5; the last good checkpoint is .*step-"
    ):
        run(tmp_path, source=source, train={"steps": 12})


def test_margin_check_finds_a_policy_that_is_not_the_reference(tmp_path: Path) -> None:
    backbone = toy.ToyBackbone()
    torch.nn.init.ones_(backbone.trunk.up)
    with pytest.raises(DiffalignError, match="before the first update policy and reference differ by"):
        toy.train(toy.toy_config(tmp_path), backbone=backbone, source=toy.ToySource(), say=lambda _: None)


def test_full_disk_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, train={"steps": 4})

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(DiffalignError, match="no space left on the disk.*step-00000004"):
        run(tmp_path, train={"steps": 8})
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]


def test_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    run(tmp_path, train={"steps": 4})
    (tmp_path / "checkpoints/step-00000004/policy.safetensors").write_bytes(b"broken")
    with pytest.raises(DiffalignError, match="cannot be read"):
        run(tmp_path, train={"steps": 8})


def test_nothing_is_pickled(tmp_path: Path) -> None:
    run(tmp_path)
    suffixes = {p.suffix for p in tmp_path.rglob("*") if p.is_file()}
    assert suffixes == {".safetensors", ".json", ".jsonl", ".yaml", ".md"}


def test_processes_that_do_not_know_each_other_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DiffalignError, match="2 processes were launched, but accelerate sees 1"):
        run(tmp_path)


def test_learning_rate_schedules() -> None:
    settings = toy.toy_config(
        Path("x"), optimizer={"lr": 1.0, "schedule": "cosine", "warmup_steps": 2}, train={"steps": 12}
    ).optimizer
    rates = [learning_rate(settings, s, 12) for s in range(12)]
    expected = [0.5, 1.0] + [0.5 * (1 + np.cos(np.pi * k / 10)) for k in range(10)]
    assert rates == pytest.approx(expected)
