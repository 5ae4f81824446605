"""The end of the trainers' verbs: the true reason of a run that fails, and a report wherever there is a row to report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from diffalign.cli import app
from diffalign.errors import DiffalignError
from diffalign.stages import trainer
from diffalign.stages.judge import judge_data
from diffalign.testbed.judge_base import untrained_judge

COMMON = ("train.threads=1", "device=cpu", "tracking.trackers=[]")
SMALL = ("n=4", "train.micro_batch=2", "validation.every=null", *COMMON)
DISTILL = (
    "distill", "shapes_sd3_gndm", "reward.terms=[]", "train.groups_per_step=2", "fake.optimizer.lr=1e30",
    "save_pipeline=false", *SMALL,
)  # fmt: skip
GRADIENT = (
    "reward-gradient", "shapes_sd3_reward_gradient", "train.images_per_step=2", "sampler.steps=2",
    "method={name: draft}", *SMALL,
)  # fmt: skip


def call(run_dir: Path, *words: object) -> int:
    with pytest.raises(SystemExit) as left:
        app([str(word) for word in (*words, f"run_dir={run_dir}")], prog_name="diffalign")
    return int(left.value.code or 0)


def preferences(folder: Path, model: Path) -> tuple[object, ...]:
    """`train` on four pairs, with a beta so large that the gradient overflows."""
    import numpy as np
    from PIL import Image

    from diffalign.data.convert import import_pairs

    rng = np.random.default_rng(0)
    for side in ("win", "lose"):
        (folder / side).mkdir()
        for n in range(4):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / side / f"{n}.png")
            (folder / side / f"{n}.txt").write_text(f"picture number {n}")
    import_pairs([folder / "win", folder / "lose"], folder / "data")
    (folder / "c.yaml").write_text(
        f"model: {{path: {model}, max_sequence_length: 12}}\ndata: {{path: {folder / 'data'}, resolution: 32}}\n"
        f"run_dir: {folder / 'run'}\nobjective: {{name: dpo, beta: 1.0e+38}}\n"
    )
    return ("train", folder / "c.yaml", "train.steps=2", "train.groups_per_step=2", *COMMON)


def judge(folder: Path) -> tuple[object, ...]:
    judge_data(folder / "data", "train", 9, 4, 3, seed=0)
    untrained_judge("student", 0).save(folder / "base")
    return (
        "judge", "shapes_judge_gdso", f"model.path={folder / 'base'}", f"data.pairs={folder / 'data/pairs.jsonl'}",
        "method=sft", "train.steps=2", "train.records_per_step=2", "train.micro_batch=1", "tune={kind: full}",
        "optimizer.lr=1e30", "optimizer.warmup_steps=0", *COMMON,
    )  # fmt: skip


@pytest.mark.parametrize("verb", ["train", "distill", "reward-gradient", "judge"])
def test_a_run_that_fails_before_its_first_row_shows_why(
    verb: str, tmp_path: Path, sd3_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words: tuple[object, ...]
    if verb == "train":
        words, reason = preferences(tmp_path, sd3_dir), "the gradient norm is "
    elif verb == "distill":
        words, reason = (*DISTILL, "train.steps=2", "fake.updates=3"), "the fake network's loss is "
    elif verb == "reward-gradient":
        words = (*GRADIENT, "train.steps=2", "rewards=[{name: sharpness, weight: 1.0e+39}]")
        reason = "the loss is "
    else:  # the second update's loss, before a row is due
        words, reason = (*judge(tmp_path), "train.log_every=2"), "the loss is "
    capsys.readouterr()
    assert call(tmp_path / "run", *words) == 2
    out, error = capsys.readouterr()
    assert "report:" not in out  # there is no row to report
    assert error.startswith(f"error: {reason}") and error.count("\n") == 1, error
    assert f"at step {2 if verb == 'judge' else 1}" in error and "the last good checkpoint is none: " in error
    assert not (tmp_path / "run/metrics.jsonl").read_text() and not (tmp_path / "run/report.html").exists()


def test_a_run_that_fails_later_has_a_report_and_shows_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the report fails: that is no reason to hide the run's own error."""
    words = (*DISTILL, "train.steps=3", "fake.updates=1")
    assert call(tmp_path / "run", *words) == 2
    assert "error: the fake network's loss is " in capsys.readouterr().err
    assert [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()] == [1]
    assert (tmp_path / "run/report.html").is_file()

    def fails(run_dir: Path) -> Any:
        raise DiffalignError("no template")

    monkeypatch.setattr(trainer, "write_report", fails)
    assert call(tmp_path / "again", *words) == 2
    caught = capsys.readouterr()
    assert "error: the fake network's loss is " in caught.err and "report:  not written (no template)" in caught.out
