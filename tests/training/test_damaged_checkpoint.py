"""A damaged checkpoint is named, with what is left to resume from; the advice, followed, gives the same run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from diffalign.errors import DiffalignError
from diffalign.training.checkpoint_files import read_record, write_record
from helpers import toy
from helpers.damage import Damage, cut, empty, json_value, junk, last, nested, tensors, text

LATEST = "checkpoints/step-00000004"
STATE, POLICY, OPTIMIZER, AVERAGE = (
    f"{LATEST}/{name}" for name in ("state.json", "policy.safetensors", "optimizer.safetensors", "ema.safetensors")
)
CHECKPOINTS: list[tuple[str, Damage]] = [
    *[(STATE, damage) for damage in (cut, empty, junk, nested, Path.unlink)],
    *[(STATE, text(content)) for content in ("{}", "[]", "3", "null")],
    *[(STATE, json_value("step", value=value)) for value in (2, "4", None, ...)],
    *[(STATE, json_value(key, value=...)) for key in ("config", "optimizer", "files")],
    (STATE, json_value("optimizer", "groups", 0, "lr", value=0.5)),
    *[(path, damage) for path in (POLICY, OPTIMIZER, AVERAGE) for damage in (cut, empty, junk, last, Path.unlink)],
    (POLICY, tensors(lambda found: found.pop(min(found)))),
]
# The same without checksums, as earlier versions wrote them: what can be told without is told.
EARLIER: list[tuple[str, Damage]] = [
    (POLICY, tensors(lambda found: found.pop(min(found)))),
    (POLICY, tensors(lambda found: found.update({min(found): found[min(found)][:1, :1].clone()}))),
    (AVERAGE, tensors(lambda found: found.pop(min(found)))),
    (OPTIMIZER, tensors(lambda found: found.update({"9999/exp_avg": found[min(found)].clone()}))),
    (STATE, json_value("step", value=2)),
    (STATE, json_value("optimizer", "groups", value=[{}, {}])),
    (STATE, json_value("optimizer", value=3)),
]


def without_checksums(run_dir: Path) -> None:
    for path in run_dir.glob("checkpoints/*/state.json"):
        record = json.loads(path.read_text())
        path.write_text(json.dumps({key: value for key, value in record.items() if key not in ("crc32", "files")}))


def train(run_dir: Path, steps: int = 4) -> None:
    config = toy.toy_config(
        run_dir,
        train={"steps": steps, "groups_per_step": 2, "micro_batch": 2, "threads": 1, "ema_decay": 0.5},
        checkpoint={"every": 2, "keep": 3},
        optimizer={"schedule": "constant"},
    )
    toy.train(config, backbone=toy.ToyBackbone(), source=toy.ToySource(), say=lambda _: None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with a checkpoint every two, and an average."""
    run_dir = tmp_path_factory.mktemp("trained") / "r"
    train(run_dir)
    return run_dir


CASES = [(*case, False) for case in CHECKPOINTS] + [(*case, True) for case in EARLIER]


@pytest.mark.parametrize(("file", "damage", "earlier"), CASES)
def test_a_damaged_checkpoint_is_named(file: str, damage: Damage, earlier: bool, trained: Path, tmp_path: Path) -> None:
    run_dir = shutil.copytree(trained, tmp_path / "r")
    if earlier:
        without_checksums(run_dir)
    damage(run_dir / file)
    advice = "it is damaged; delete it, and the same command resumes from step-00000002"
    with pytest.raises(DiffalignError, match=rf"^checkpoint .*{LATEST} cannot be read \(.+\); {advice}$") as caught:
        train(run_dir, steps=5)
    assert "\n" not in str(caught.value)


def test_text_that_utf8_cannot_hold_is_no_damage(tmp_path: Path) -> None:
    """A file's name that is not UTF-8 stands in the config as lone surrogates."""
    record = {"step": 4, "config": {"a": "\udcff", "b": 1e-300}, "optimizer": {"scalars": {}, "groups": [{}]}}
    (tmp_path / "step-00000004").mkdir()
    write_record(tmp_path / "step-00000004", record)
    assert read_record(tmp_path / "step-00000004")["config"]["b"] == 1e-300


def test_without_an_earlier_one_the_first_step_is_named(trained: Path, tmp_path: Path) -> None:
    run_dir = shutil.copytree(trained, tmp_path / "r")
    shutil.rmtree(run_dir / "checkpoints/step-00000002")
    cut(run_dir / POLICY)
    with pytest.raises(DiffalignError, match="delete it, and the same command begins with the first step"):
        train(run_dir)


@pytest.mark.parametrize("earlier", [False, True])
def test_the_advice_gives_the_same_run(earlier: bool, trained: Path, tmp_path: Path) -> None:
    """With checksums, and without as earlier versions wrote them: equal weights, metrics and checkpoint."""
    run_dir = shutil.copytree(trained, tmp_path / "r")
    if earlier:
        without_checksums(run_dir)
    shutil.rmtree(run_dir / LATEST)
    train(run_dir)
    assert (run_dir / "metrics.jsonl").read_bytes() == (trained / "metrics.jsonl").read_bytes()
    for path in ("weights/weights.safetensors", POLICY, OPTIMIZER, AVERAGE):
        want, found = load_file(trained / path), load_file(run_dir / path)
        assert want.keys() == found.keys() and all((want[key] == found[key]).all() for key in want)
