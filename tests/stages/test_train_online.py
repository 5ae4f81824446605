"""`diffalign train` with `train.online`, from prompts and a reward to weights and a report, with a genuine model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffalign.config import TrainConfig
from diffalign.data.embeddings import LivePrompts
from diffalign.errors import DiffalignError
from diffalign.pipelines import load_backbone
from diffalign.pipelines.settings import SamplingSettings
from diffalign.stages.train import train
from diffalign.training.preference.samplers import PipelineSampler
from helpers.drawn_run import rows


def config_for(model: Path, folder: Path, **online: Any) -> TrainConfig:
    (folder / "p.txt").write_text("a red cube\ntwo dogs\nsnow\n")
    plain: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "device": "cpu",
        "model": {"path": str(model)},
        "tune": {"rank": 4, "alpha": 4.0, "reference": "old"},
        "data": {"cache_dtype": "float32"},
        "labels": {"source": "scores.red", "transform": "optimality"},
        "objective": {"name": "nft"},
        "noise": "tracked",
        "train": {
            "steps": 2, "groups_per_step": 2, "micro_batch": 2, "threads": 1,
            "online": {
                "prompts": str(folder / "p.txt"), "rewards": [{"name": "helpers.drawn_run:Red"}], "every": 1, "groups": 2,
                "images_per_prompt": 2, "steps": 2, "batch_size": 4, **online,
            },
        },
        "optimizer": {"lr": 0.02},
        "tracking": {"trackers": []},
    }  # fmt: skip
    return TrainConfig.model_validate(plain)


def test_from_prompts_to_a_report(sd3_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_for(sd3_dir, tmp_path)
    train(config, dry_run=True)
    assert "2 prompts x 2 images = 4, 2 steps each" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    train(config)
    found = rows(tmp_path / "run/metrics.jsonl")
    assert found[0]["drift"] == 0.0  # policy and old policy are one before the first update
    assert [row["epoch"] for row in found] == [1, 2]
    draws = rows(tmp_path / "run/online.jsonl")
    assert [row["step"] for row in draws] == [0, 1] and all(len(row["scores"]["red.redness"]) == 2 for row in draws)
    page = (tmp_path / "run/report.html").read_text()
    assert "Images drawn in training" in page and "samples at step 1" in page
    weights = load_file(next((tmp_path / "run/weights").glob("*.safetensors")))
    assert max(float(v.abs().max()) for k, v in weights.items() if "lora_B" in k) > 0
    assert json.loads(next((tmp_path / "run/cache").glob("prompts-*/index.json")).read_text())


def test_the_sampler_draws_the_images_of_diffalign_sample(sd3_dir: Path, sdxl_dir: Path) -> None:
    for folder, scale, negative in ((sd3_dir, 1.0, None), (sdxl_dir, 3.0, "blue")):
        backbone = load_backbone(folder)
        settings = SamplingSettings(2, scale, negative, 64, 64)
        prompts, seeds = ["a red cube", "two dogs"], [3, 4]
        wanted = backbone.sample(prompts, seeds, settings, output_type="latent")
        embeddings = LivePrompts(backbone, exact=True).batch(prompts)
        sampler = PipelineSampler(backbone, settings, backbone.encode_guided([""], negative))
        backbone.drop_encoders(keep_vae=True)
        found = sampler(embeddings, seeds)["latents"]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        assert not np.allclose(found[0], found[1])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"source": "scores.blue"}, "labels.source: scores.blue is asked for, and train.online.rewards has red"),
        ({"source": "scores.red.greenness"}, "labels.source: red has no column greenness; it has redness"),
    ],
)
def test_labels_that_no_reward_makes(sd3_dir: Path, tmp_path: Path, labels: dict[str, Any], message: str) -> None:
    config = config_for(sd3_dir, tmp_path)
    with pytest.raises(DiffalignError) as caught:
        train(config.model_copy(update={"labels": config.labels.model_copy(update=labels)}))
    assert message in str(caught.value)
