"""What may change when a run resumes, what may not, and that this is said before anything heavy is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffalign.config import DistillConfig, JudgeConfig, RewardGradientConfig, TrainConfig
from diffalign.config.objective import OBJECTIVE_SECTIONS
from diffalign.config.section import OnResume, Section
from diffalign.errors import DiffalignError
from diffalign.files.checksums import CRC
from diffalign.training.checkpoint import check_before_loading
from helpers import toy

STEPS = 8


def run(run_dir: Path, steps: int = STEPS, resolved: dict[str, str] | None = None, **sections: Any) -> list[str]:
    """Train the toy to `steps`; return what was said."""
    said: list[str] = []
    sections["train"] = {"steps": steps, **sections.get("train", {})}
    toy.train(
        toy.toy_config(run_dir, **sections),
        backbone=toy.ToyBackbone(),
        source=toy.ToySource(),
        say=said.append,
        resolved=resolved,
    )
    return said


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "weights/weights.safetensors")


def losses(run_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def changed(said: list[str]) -> str:
    (line,) = [line for line in said if line.startswith("changed: ")]
    return line


# --- keys that change no number ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"checkpoint": {"every": 3, "keep": 1}},
        {"tracking": {"project": "other"}},
        {"on_alarm": "stop"},
        {"data": {"cache": "off"}},
        {"data": {"cache_dir": "elsewhere"}},
        {"model": {"gradient_checkpointing": True}},
        {"model": {"local_files_only": True}},
        {"validation": {"prompts": "held_out.txt", "steps": 9, "n": 3}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_keys_that_change_no_number_may_change_and_are_named(tmp_path: Path, change: dict[str, Any]) -> None:
    run(tmp_path / "straight")
    run(tmp_path / "resumed", steps=4)
    line = changed(run(tmp_path / "resumed", **change))
    section, values = next(iter(change.items()))
    for key in values if isinstance(values, dict) else [None]:
        assert f"{section}.{key} was " in line if key else f"{section} was " in line
    assert line.endswith(": no number changes") and "rounding" not in line
    assert (tmp_path / "resumed/metrics.jsonl").read_bytes() == (tmp_path / "straight/metrics.jsonl").read_bytes()
    a, b = weights(tmp_path / "straight"), weights(tmp_path / "resumed")
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "change",
    [
        {"train": {"micro_batch": 1}},
        {"train": {"micro_batch": 2}},
        {"train": {"images_per_pass": 1}},
        {"train": {"threads": 2}},
        {"device": "auto"},
        {"optimizer": {"lr": 1e-2, "offload": True}},
    ],
    ids=str,
)
def test_keys_that_change_last_digits_say_so(tmp_path: Path, change: dict[str, Any]) -> None:
    run(tmp_path / "straight")
    run(tmp_path / "resumed", steps=4)
    line = changed(run(tmp_path / "resumed", **change))
    assert line.endswith(": numbers stay the same within rounding")
    assert losses(tmp_path / "resumed") == pytest.approx(losses(tmp_path / "straight"), rel=1e-4)
    assert losses(tmp_path / "resumed")[:4] == losses(tmp_path / "straight")[:4]


def test_a_run_directory_may_be_moved(tmp_path: Path) -> None:
    run(tmp_path / "straight")
    run(tmp_path / "a", steps=4)
    (tmp_path / "a").rename(tmp_path / "b")
    assert f"run_dir was '{tmp_path / 'a'}', is now '{tmp_path / 'b'}'" in changed(run(tmp_path / "b"))
    assert losses(tmp_path / "b") == losses(tmp_path / "straight")


def test_nothing_is_said_where_nothing_changed(tmp_path: Path) -> None:
    run(tmp_path)
    assert not [line for line in run(tmp_path) if line.startswith("changed")]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_what_a_kill_left_of_checkpoints_is_cleared(tmp_path: Path, keep: int) -> None:
    """A kill between the writing of a checkpoint and the deletion of an older one, and in the middle of writing one."""
    given: dict[str, Any] = {"checkpoint": {"every": 2, "keep": keep}}
    run(tmp_path / "straight", **given)
    run(tmp_path / "killed", checkpoint={"every": 2, "keep": 4})
    (tmp_path / "killed/checkpoints/step-00000007.part").mkdir()
    run(tmp_path / "killed", **given)
    a, b = (sorted(p.name for p in (tmp_path / name / "checkpoints").iterdir()) for name in ("straight", "killed"))
    assert a == b and len(a) == keep


# --- places: compared by content --------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["model.path", "data.path", "tune.init", "model.revision"])
def test_places_may_change_where_the_content_is_the_same(tmp_path: Path, key: str) -> None:
    section, name = key.split(".")
    before = {section: {"path": "toy", name: "here"}} if section != "tune" else {"tune": {name: "here"}}
    after = {section: {**before[section], name: "there"}}
    run(tmp_path, steps=4, resolved={key: "f1"}, **before)
    with pytest.raises(DiffalignError, match=rf"belongs to another config: {key} was here \(f1\), is now there \(f2\)"):
        run(tmp_path, resolved={key: "f2"}, **after)
    line = changed(run(tmp_path, resolved={key: "f1"}, **after))
    assert f"{key} was 'here', is now 'there'" in line and line.endswith(": no number changes")


def test_other_content_at_the_same_place_is_refused(tmp_path: Path) -> None:
    run(tmp_path, steps=4, resolved={"data.path": "f1"})
    with pytest.raises(DiffalignError, match=r"data.path was toy \(f1\), is now toy \(f2\)"):
        run(tmp_path, resolved={"data.path": "f2"})


def test_without_fingerprints_paths_are_compared(tmp_path: Path) -> None:
    """As in checkpoints of earlier versions."""
    run(tmp_path, steps=4)
    with pytest.raises(DiffalignError, match="data.path was 'toy', is now 'elsewhere'"):
        run(tmp_path, resolved={"data.path": "f"}, data={"path": "elsewhere"})


def test_the_precision_behind_auto_is_compared(tmp_path: Path) -> None:
    run(tmp_path, steps=4, resolved={"train.mixed_precision": "no"})
    with pytest.raises(DiffalignError, match=r"train.mixed_precision was auto \(no\), is now auto \(bf16\)"):
        run(tmp_path, resolved={"train.mixed_precision": "bf16"})
    run(tmp_path, resolved={"train.mixed_precision": "no"}, train={"mixed_precision": "no"})


# --- keys that change numbers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": {"ema_decay": 0.9}}, "train.ema_decay was None, is now 0.9"),
        ({"optimizer": {"lr": 2e-2}}, "optimizer.lr was 0.01, is now 0.02"),
        ({"train": {"groups_per_step": 8}}, "train.groups_per_step was 4, is now 8"),
        ({"model": {"dtype": "bfloat16"}}, "model.dtype was 'auto', is now 'bfloat16'"),
        ({"optimizer": {"name": "adafactor", "lr": 1e-2}}, "optimizer.name was 'adamw', is now 'adafactor'"),
    ],
)
def test_keys_that_change_numbers_are_named_before_tensors_are_read(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    run(tmp_path, steps=4)
    for file in (tmp_path / "checkpoints/step-00000004").glob("*.safetensors"):
        file.unlink()
    sections = {**change, "train": {"steps": STEPS, **change.get("train", {})}}
    for attempt in (
        lambda: run(tmp_path, **change),
        lambda: check_before_loading(toy.toy_config(tmp_path, **sections)),
    ):
        with pytest.raises(DiffalignError) as caught:
            attempt()
        said = str(caught.value)
        assert f"belongs to another config: {message}" in said and "delete" not in said
        assert "restore the old value" in said and "tune.init=" in said


def test_all_that_differs_is_named(tmp_path: Path) -> None:
    run(tmp_path, steps=4)
    with pytest.raises(DiffalignError, match=r"noise was .*\(and 2 more: optimizer.lr, seed\)"):
        run(tmp_path, seed=1, optimizer={"lr": 1e-3}, noise="independent", device="auto")


def test_buckets_draw_the_groups_of_a_micro_batch_together(tmp_path: Path) -> None:
    run(tmp_path, steps=4, data={"buckets": "auto"})
    with pytest.raises(DiffalignError, match="train.micro_batch was 4, is now 2"):
        run(tmp_path, data={"buckets": "auto"}, train={"micro_batch": 2})
    # Before the model is there, nobody knows what auto will be.
    check_before_loading(toy.toy_config(tmp_path, data={"buckets": "auto"}, train={"steps": 4, "micro_batch": "auto"}))


def test_a_schedule_depends_on_the_number_of_steps(tmp_path: Path) -> None:
    given: dict[str, Any] = {"optimizer": {"lr": 1e-2, "schedule": "cosine"}}
    run(tmp_path, steps=4, **given)
    with pytest.raises(DiffalignError, match="train.steps was 4, is now 8"):
        run(tmp_path, **given)


def test_images_of_validations_stay_the_same_once_there_are_some(tmp_path: Path) -> None:
    config = toy.toy_config(tmp_path, validation={"every": 2, "prompts": "a.txt"}, train={"steps": 4})
    scripted = toy.Scripted(toy.ToyBackbone(), config.validation, [], {}, {}, 8, 0, {})
    toy.train(config, backbone=toy.ToyBackbone(), source=toy.ToySource(), say=lambda _: None, validation=scripted)
    with pytest.raises(DiffalignError, match=r"validation.prompts was 'a.txt', is now 'b.txt'"):
        check_before_loading(toy.toy_config(tmp_path, validation={"every": 2, "prompts": "b.txt"}))
    check_before_loading(toy.toy_config(tmp_path, validation={"every": 3, "prompts": "a.txt", "patience": 1}))
    check_before_loading(toy.toy_config(tmp_path))  # without a validation nothing is compared


# --- configs of earlier versions --------------------------------------------------------------------------------------


def older(run_dir: Path, *dropped: str) -> None:
    """Take keys out of the newest checkpoint's config, as if it were from before there were any."""
    path = max((run_dir / "checkpoints").iterdir()) / "state.json"
    record = json.loads(path.read_text())
    for key in dropped:
        *sections, name = key.split(".")
        place = record["config"]
        for section in sections:
            place = place[section]
        del place[name]
    for name in ("resolved", "rows", "interim", CRC):
        record.pop(name)
    path.write_text(json.dumps(record))


@pytest.mark.parametrize(
    "key", ["kind", "train.ema_slope", "train.max_grad_norm", "validation", "selection", "model.options", "data.cache"]
)
def test_a_key_that_an_older_run_lacks_had_its_default(tmp_path: Path, key: str) -> None:
    run(tmp_path / "straight")
    run(tmp_path / "resumed", steps=4)
    older(tmp_path / "resumed", key)
    run(tmp_path / "resumed")
    assert losses(tmp_path / "resumed") == losses(tmp_path / "straight")


def test_a_key_that_an_older_run_lacks_may_not_be_set(tmp_path: Path) -> None:
    run(tmp_path, steps=4)
    older(tmp_path, "train.max_grad_norm")
    with pytest.raises(DiffalignError, match=r"train.max_grad_norm was 1.0, is now 0.5"):
        run(tmp_path, train={"max_grad_norm": 0.5})


def test_an_average_from_before_its_warm_up_resumes_without_one_or_is_refused(tmp_path: Path) -> None:
    plain = {"ema_decay": 0.9, "ema_warmup": False}
    run(tmp_path / "straight", train=plain)
    run(tmp_path / "resumed", steps=4, train=plain)
    older(tmp_path / "resumed", "train.ema_warmup", "train.ema_slope")
    with pytest.raises(DiffalignError, match="train.ema_warmup was False, is now True"):
        run(tmp_path / "resumed", train={"ema_decay": 0.9})
    run(tmp_path / "resumed", train=plain)
    a, b = weights(tmp_path / "straight"), weights(tmp_path / "resumed")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_without_an_average_does_not_care_for_the_warm_up(tmp_path: Path) -> None:
    run(tmp_path, steps=4)
    older(tmp_path, "train.ema_warmup", "train.ema_slope")
    run(tmp_path)


# --- rules stand on fields --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [TrainConfig, DistillConfig, RewardGradientConfig, JudgeConfig])
def test_every_rule_names_keys_that_exist(kind: type[Section]) -> None:
    def keys(section: type[Section], prefix: str = "") -> set[str]:
        found = set()
        for name, field in section.model_fields.items():
            found.add(f"{prefix}{name}")
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                found |= keys(field.annotation, f"{prefix}{name}.")
        return found

    def rules(section: type[Section]) -> list[OnResume]:
        inner = [f.annotation for f in section.model_fields.values() if isinstance(f.annotation, type)]
        own = [m for f in section.model_fields.values() for m in f.metadata if isinstance(m, OnResume)]
        return own + [rule for one in inner if issubclass(one, Section) for rule in rules(one)]

    everywhere = set().union(*map(keys, (TrainConfig, DistillConfig, RewardGradientConfig, JudgeConfig)))
    everywhere |= {f"objective.{key}" for section in OBJECTIVE_SECTIONS.values() for key in section.model_fields}
    assert {key for rule in rules(kind) for key, _ in rule.only_where} <= everywhere
