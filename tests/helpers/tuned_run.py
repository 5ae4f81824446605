"""A run directory with weights that draw another image than the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffalign.config import TrainConfig, resolved_yaml
from diffalign.pipelines import load_backbone
from helpers.run_directory import make_run

PROMPT, SEED = "a red cube", 11
SIZE: dict[str, Any] = {"height": 64, "width": 64}


def tuned_run(folder: Path, model: Path, kind: str = "lora") -> np.ndarray:
    """A run directory whose weights differ clearly from the base; returns the image they draw, [64, 64, 3] in [0, 1]."""
    make_run(folder)
    plain_config = {
        "run_dir": str(folder), "device": "cpu", "model": {"path": str(model), **options_of(model)},
        "tune": {"kind": kind, "rank": 4, "alpha": 6.0}, "data": {"path": str(folder / "data")},
        "train": {"steps": 40},
    }  # fmt: skip
    (folder / "config.yaml").write_text(resolved_yaml(TrainConfig.model_validate(plain_config)))
    backbone = load_backbone(model, **options_of(model))
    if kind == "lora":
        backbone.add_lora(4, 6.0)
    else:
        backbone.enable_full(keep_reference=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in backbone.trainable().values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    backbone.save_weights(folder / "weights")
    tuned, base = draw(backbone, "policy"), None
    if kind == "lora":
        base = draw(backbone, "reference")
        assert np.abs(tuned - base).max() > 0.05  # else any file would do
    return tuned


def draw(backbone: Any, role: str) -> np.ndarray:
    with backbone.role(role):
        pixels = backbone.sample([PROMPT], [SEED], steps=3, guidance_scale=2.0, output_type="pt", **SIZE)
    return pixels[0].permute(1, 2, 0).numpy()


def options_of(model: Path) -> dict[str, Any]:
    return {"max_sequence_length": 12} if "sd3" in str(model) or "flux" in str(model) else {}
