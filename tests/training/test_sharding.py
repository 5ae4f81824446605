"""FSDP2 over two processes on a CPU against one process: full fine-tuning of a tiny SD3, with an average and a resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from diffalign.errors import DiffalignError
from diffalign.pipelines import load_backbone
from helpers import sharded_run, toy
from helpers.processes import finish, torchrun
from helpers.tiny_training import Source, config_for


def test_two_processes_with_cut_weights_equal_one(sd3_dir: Path, tmp_path: Path) -> None:
    program = sharded_run.__file__
    finish([*torchrun(), program, str(sd3_dir), str(tmp_path / "two"), "fsdp2", "4", "10"])

    config = config_for(sd3_dir, tmp_path / "one", 10, optimizer={"lr": 1e-3})
    tuned = {"tune": config.tune.model_copy(update={"kind": "full"})}
    trained = {"train": config.train.model_copy(update={"micro_batch": 1, "ema_decay": 0.5})}
    backbone = load_backbone(sd3_dir)
    toy.train(
        config.model_copy(update={**tuned, **trained}), backbone=backbone, source=Source(backbone), say=lambda _: None
    )

    one, two = (
        [json.loads(text) for text in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert two[0]["margin"] == 0.0
    assert two[0]["grad_norm"] == pytest.approx(one[0]["grad_norm"], rel=1e-5)
    # 10 of them, from two runs: the second of which went on from step 4.
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-4)

    # diffusers reads the weights, which are those of one process.
    from diffusers import SD3Transformer2DModel

    loaded = SD3Transformer2DModel.from_pretrained(tmp_path / "two" / "weights" / "transformer").state_dict()
    for name, value in load_file(
        tmp_path / "one" / "weights" / "transformer" / "diffusion_pytorch_model.safetensors"
    ).items():
        assert float((loaded[name] - value).abs().max()) < 2e-3, name


def test_one_process_alone_is_refused(sd3_dir: Path, tmp_path: Path) -> None:
    config = config_for(sd3_dir, tmp_path, 1)
    tuned = {"tune": config.tune.model_copy(update={"kind": "full"})}
    cut = {"train": config.train.model_copy(update={"shard": "fsdp2"})}
    backbone = load_backbone(sd3_dir)
    with pytest.raises(DiffalignError, match="one process has nothing to cut its weights over"):
        toy.train(
            config.model_copy(update={**tuned, **cut}), backbone=backbone, source=Source(backbone), say=lambda _: None
        )
