"""The shipped base models: genuine diffusers folders, small, and they follow their prompts to a degree."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

from diffalign import testbed
from diffalign.pipelines import load_backbone
from diffalign.rewards.geneval import GenEvalReward
from diffalign.testbed.detector import ShapeDetector
from diffalign.testbed.models import LATENTS
from diffalign.testbed.pretrain import PretrainSettings, main
from diffalign.testbed.shape_prompts import draw_prompts


@pytest.mark.parametrize("name", testbed.MODELS)
def test_loads_unaided_and_is_small(name: str) -> None:
    folder = testbed.model_path(name)
    pipeline = DiffusionPipeline.from_pretrained(folder)
    modules = [c for c in pipeline.components.values() if isinstance(c, nn.Module)]
    assert sum(p.numel() for m in modules for p in m.parameters()) <= 6_000_000
    assert sum(path.stat().st_size for path in folder.rglob("*.safetensors")) <= 12_000_000
    assert "steps" in json.loads((folder / "pretraining.json").read_text())
    pipeline.set_progress_bar_config(disable=True)
    anything = "ein Kreis, 円, <|endoftext|> \N{PARTY POPPER}"
    image = pipeline.to(torch.float32)(anything, num_inference_steps=2).images[0]
    assert image.size == (64, 64)


@pytest.mark.parametrize("name", testbed.MODELS)
def test_follows_its_prompts(name: str) -> None:
    """Its images suit their own prompts better than each other's."""
    rows = draw_prompts("validation", 48)
    texts = [row["prompt"] for row in rows]
    images = load_backbone(testbed.model_path(name)).sample(
        texts, list(range(48)), steps=10, guidance_scale=4.0, output_type="pil"
    )
    reward = GenEvalReward(detector=ShapeDetector())
    own = reward.score(images, texts, rows).mean()
    others = [reward.score(images, texts, rows[k:] + rows[:k]).mean() for k in (7, 13, 19)]
    assert own > np.mean(others) + 0.1


@pytest.mark.parametrize("name", testbed.MODELS)
def test_pretraining_goes_on_where_it_stopped(name: str, tmp_path: Path) -> None:
    """The command that made them, at the size of a test: a snapshot in the middle changes nothing."""
    settings = PretrainSettings(scenes=16, vae_steps=2, vae_batch=4, steps=3, batch=4, snapshot_every=2)
    said: list[str] = []
    main(name, tmp_path / "straight", settings, said.append)
    state = tmp_path / "straight" / f"{name}-snapshot.pt"
    assert torch.load(state, weights_only=True)["step"] == 3
    stopped = tmp_path / "stopped"
    main(name, stopped, settings, said.append, until=2)
    assert not (stopped / name).exists()
    main(name, stopped, settings, said.append)
    a, b = (DiffusionPipeline.from_pretrained(tmp_path / run / name) for run in ("straight", "stopped"))
    trunk = "transformer" if name == "shapes-sd3" else "unet"
    for (key, x), y in zip(
        a.components[trunk].state_dict().items(), b.components[trunk].state_dict().values(), strict=True
    ):
        assert torch.equal(x, y), key
    assert a.vae.config.latent_channels == LATENTS[name].channels
