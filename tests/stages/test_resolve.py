"""Names in a config become devices, models, prompts and rewards, or one line that says what to mend."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffalign.config import ModelSection, RewardSection, TrainConfig
from diffalign.errors import DiffalignError
from diffalign.stages import resolve, resolve_rewards
from diffalign.stages.resolve import settled
from diffalign.testbed.detector import ShapeDetector
from diffalign.training.same_run import changes, plain_config


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_rewards.resolve_device("auto") == resolve_rewards.resolve_device("cpu") == "cpu"
    with pytest.raises(DiffalignError, match="device gpu: unknown; one of auto, cpu, cuda"):
        resolve_rewards.resolve_device("gpu")
    with pytest.raises(DiffalignError, match="no usable CUDA device; use cpu or auto"):
        resolve_rewards.resolve_device("cuda")


def test_processes_share_the_gpus_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_rewards.process_device("auto") == "cuda"
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert resolve_rewards.process_device("auto") == "cuda:1" and resolve_rewards.process_device("cpu") == "cpu"


def test_a_pipeline_to_save_loads_without_what_only_a_gpu_has(sd3_dir: Path) -> None:
    model = ModelSection(path=str(sd3_dir), dtype="bfloat16", attention="xformers", quantize="nf4")
    backbone = resolve.open_plain_backbone(model)
    assert (backbone.dtype, backbone.attention, backbone.device.type) == (torch.float32, "sdpa", "cpu")


def test_prompts_of_a_table(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("caption,kind\na dog,x\na cat,y\na dog,z\na cow,x\n")
    given = (str(tmp_path / "p.csv"), 3)
    assert [r.prompt for r in resolve.resolve_prompts(*given, column="caption")] == ["a dog", "a cat", "a dog"]
    rows = resolve.resolve_prompts(*given, column="caption", unique=True)
    assert [r.prompt for r in rows] == ["a dog", "a cat", "a cow"] and rows[0].metadata == {"kind": "x"}


def test_prompts_of_the_embedded_world() -> None:
    rows = resolve.resolve_prompts("testbed:test", 5, seed=3)
    assert len(rows) == 5 and all("include" in row.metadata for row in rows)
    assert rows != resolve.resolve_prompts("testbed:test", 5, seed=4)


def test_a_detector_goes_to_rewards_that_take_one() -> None:
    """Every reward's section has `detector: shapes` by default."""
    assert isinstance(resolve_rewards.open_reward(RewardSection(name="geneval"), "cpu").detector, ShapeDetector)
    assert resolve_rewards.open_reward(RewardSection(name="sharpness"), "cpu").name == "sharpness"
    assert isinstance(resolve_rewards.build_reward("geneval", {"detector": "shapes"}, "cpu").detector, ShapeDetector)
    with pytest.raises(DiffalignError, match="reward geneval: unknown detector 'shape'; there are shapes"):
        resolve_rewards.build_reward("geneval", {"detector": "shape"}, "cpu")


def test_a_rewards_own_device_counts() -> None:
    assert resolve_rewards.build_reward("pickscore", {}, "cuda:1").device == "cuda:1"
    assert resolve_rewards.build_reward("pickscore", {"device": "cpu"}, "cuda:1").device == "cpu"


def test_weights_without_tensors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DiffalignError, match=r"no \.safetensors file in it"):
        resolve.weights_digest(tmp_path)


@pytest.mark.parametrize(
    ("device", "bf16", "kind", "wanted"),
    [
        ("cpu", False, "lora", "float32"),
        ("cuda", True, "lora", "bfloat16"),
        ("cuda", False, "lora", "float32"),
        ("cuda", True, "full", "float32"),
        ("auto", True, "lora", "bfloat16"),
    ],
)
def test_the_number_type_follows_the_device(
    device: str, bf16: bool, kind: str, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the config that a run writes says which it was; a stated type stays."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)
    plain = {
        "run_dir": "r", "device": device, "model": {"path": "m"}, "data": {"path": "d"}, "objective": {"name": "dpo"},
        "tune": {"kind": kind},
    }  # fmt: skip
    config = TrainConfig.model_validate(plain)
    assert config.model.dtype == "auto" and settled(config).model.dtype == wanted
    for stated in ("float32", "bfloat16"):
        given = TrainConfig.model_validate({**plain, "model": {"path": "m", "dtype": stated}})
        assert settled(given) == given


def test_runs_of_before_resume() -> None:
    """Their configs state the type that auto takes on a CPU, and lack the keys that came later."""
    plain = {
        "run_dir": "r", "device": "cpu", "model": {"path": "m"}, "data": {"path": "d"}, "objective": {"name": "dpo"},
    }  # fmt: skip
    config = settled(TrainConfig.model_validate(plain))
    now = plain_config(config)
    before = {**now, "model": {k: v for k, v in now["model"].items() if k not in ("lora_text_encoders", "config")}}
    assert before["model"]["dtype"] == "float32" and len(before["model"]) == len(now["model"]) - 2
    assert changes(before, config, {}, {}) == []
    other = config.model_copy(update={"model": config.model.model_copy(update={"config": "c"})})
    assert [change.key for change in changes(before, other, {}, {})] == ["model.config"]
