"""`train.micro_batch: auto`: the number follows from the predicted memory, is written down, and stays on a resume."""

from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diffalign.config import load_config, load_run_config, resolved_yaml
from diffalign.errors import DiffalignError
from diffalign.pipelines import load_backbone
from diffalign.stages import micro_batch
from diffalign.training.memory import MemoryPrediction, fitting_checkpointing, fitting_micro_batch


def config_of(folder: Path, tmp_path: Path, *more: str) -> Any:
    given = [f"model={folder}", "data=d", f"run_dir={tmp_path / 'run'}", "data.resolution=64", "model.variant=null"]
    given += ["model.dtype=float32", "optimizer=adamw", "train.micro_batch=auto"]
    return load_config("sdxl_dpo", [*given, *more])


def prediction_of(config: Any, folder: Path) -> MemoryPrediction:
    backbone = load_backbone(folder)
    return MemoryPrediction(config, backbone, backbone.encode_prompts([""]), cuda=True)


def test_the_largest_divisor_that_fits(sdxl_dir: Path, tmp_path: Path) -> None:
    """Each size is compared with its own prediction, which the function extrapolates from two."""
    config = config_of(sdxl_dir, tmp_path, "train.groups_per_step=12")
    prediction: Any = prediction_of(config, sdxl_dir)
    prediction.of_groups = functools.cache(prediction.of_groups)  # the same sizes are asked for again and again
    peaks = {n: prediction.of_groups(n, 2)[1]["peak"] for n in (1, 2, 3, 4, 6, 12)}
    # A step of one micro-batch has no gradients of an earlier one, and takes a little less than the sizes below it foretell.
    for n, peak in [(n, peak) for n, peak in peaks.items() if n < 12]:
        assert fitting_micro_batch(prediction, 2, int(1.001 * peak)) == n
        assert fitting_micro_batch(prediction, 2, int(0.999 * peak)) == max((m for m in peaks if m < n), default=1)
    assert fitting_micro_batch(prediction, 2, 2**40) == 12 and fitting_micro_batch(prediction, 2, 0) == 1
    assert prediction.trainable == sum(p.numel() for p in prediction.backbone.trainable().values()) > 0


def test_checkpointing_is_chosen_by_what_fits(sdxl_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Off, attention kept, on: each as soon as the faster one is predicted not to fit."""
    more = (
        "train.groups_per_step=4",
        "train.micro_batch=4",
        "model.gradient_checkpointing=auto",
        "data.resolution=256",
    )
    config = config_of(sdxl_dir, tmp_path, *more)
    prediction = prediction_of(config, sdxl_dir)
    peaks: list[int] = []
    kinds: tuple[Any, ...] = (False, "attention", True)
    for kind in kinds:
        prediction.backbone.checkpoint(kind)
        peaks.append(prediction.of_groups(4, 2)[1]["peak"])
    assert peaks[0] > peaks[1] > peaks[2]
    rooms = [peaks[0], peaks[0] - 1, peaks[1] - 1, 0]
    assert [fitting_checkpointing(prediction, 4, 2, room) for room in rooms] == [False, "attention", True, True]

    # On a CPU there is no memory to predict for; a stated kind stays.
    accelerator: Any = SimpleNamespace(device=torch.device("cpu"), num_processes=1, is_main_process=True)
    assert micro_batch.chosen_checkpointing(config, 2, accelerator) is False
    stated = config_of(sdxl_dir, tmp_path, "model.gradient_checkpointing=true")
    assert micro_batch.chosen_checkpointing(stated, 2, accelerator) is True
    monkeypatch.setattr(micro_batch, "gpu_room", lambda: peaks[1])
    accelerator.device = torch.device("cuda")
    assert micro_batch.chosen_checkpointing(config, 2, accelerator) == "attention"


@pytest.mark.parametrize(("drawn", "processes", "wanted"), [(16, 1, 16), (16, 4, 4), (48, 1, 16), (7, 1, 7), (2, 2, 1)])
def test_it_divides_a_processs_share(
    drawn: int, processes: int, wanted: int, sdxl_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(sdxl_dir, tmp_path, f"train.groups_per_step={drawn}")
    monkeypatch.setattr(micro_batch, "gpu_room", lambda: 2**40)
    accelerator: Any = SimpleNamespace(device=torch.device("cuda"), num_processes=processes)
    assert micro_batch._found(config, 2, accelerator) == wanted


def test_a_resumed_run_keeps_its_number(sdxl_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a larger GPU, too: the file says 2, and nothing is predicted."""
    config = config_of(sdxl_dir, tmp_path)
    accelerator: Any = SimpleNamespace(device=torch.device("cpu"), num_processes=1, is_main_process=True)
    settled = micro_batch.with_micro_batch(config, 2, accelerator)
    assert settled.train.micro_batch == 8  # no GPU to fill: as without the key
    settled = settled.model_copy(update={"train": settled.train.model_copy(update={"micro_batch": 2})})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(resolved_yaml(settled))
    assert "micro_batch: 2" in resolved_yaml(settled) and "micro_batch: auto" in resolved_yaml(config)
    monkeypatch.setattr(micro_batch, "predicted", None)
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda"), num_processes=1, is_main_process=True)
    assert micro_batch.kept_micro_batch(config) == settled
    assert micro_batch.with_micro_batch(settled, 2, on_gpu) == settled
    stated = config_of(sdxl_dir, tmp_path, "train.micro_batch=4")
    assert micro_batch.with_micro_batch(stated, 2, on_gpu) == stated


def test_auto_is_read_and_written_as_a_word(tmp_path: Path) -> None:
    config = load_config("sdxl_dpo_small")
    path = tmp_path / "c.yaml"
    path.write_text(resolved_yaml(config))
    assert load_config(path) == config == load_run_config(path)
    assert load_config("sdxl_dpo_small", ["train.groups_per_step=5"]).train.micro_batch == config.train.micro_batch
    for wrong in ("lots", "-1", "2.5", "[auto]"):
        with pytest.raises(DiffalignError, match="train.micro_batch should be"):
            load_config("sdxl_dpo", [f"train.micro_batch={wrong}"])
