"""What the trainer measures for NFT and AWM beyond errors: the gap to the base, and residuals of mixed predictions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from diffalign.config import TrainConfig
from diffalign.objectives import NFT, GroupErrors, ObjectiveOutput
from diffalign.pipelines import load_backbone
from diffalign.training.preference.draws import make_draws
from diffalign.training.preference.policy import prepare_policy
from diffalign.training.preference.step import preference_step
from helpers.tiny_training import Source, config_for


@dataclass(frozen=True)
class Anchored(NFT):
    """NFT's needs, and a loss that is not looked at."""

    seen: ClassVar[list[GroupErrors]] = []

    def __call__(self, group: GroupErrors) -> ObjectiveOutput:
        self.seen.append(group)
        return ObjectiveOutput(group.policy_error.sum(1))


def moved(backbone: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in backbone.trainable().values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize(
    ("family", "kind", "reference"),
    [("sd3", "lora", "init"), ("sd3", "lora", "base"), ("sdxl", "full", "init")],
)
def test_gaps_and_residuals_are_those_of_the_predictions(
    family: str, kind: str, reference: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """In x0 space, but for the anchor; the base is neither the policy nor the LoRA that the policy began with."""
    folder = request.getfixturevalue(f"{family}_dir")
    tune: dict[str, Any] = {"kind": kind}
    if kind == "lora":
        first = load_backbone(folder)
        first.add_lora(4, 4.0)
        moved(first, 1)
        first.save_weights(tmp_path / "lora")
        tune |= {"init": str(tmp_path / "lora"), "reference": reference}
    plain = config_for(folder, tmp_path / "run", 4, error_space="x0").model_dump(mode="json")
    config = TrainConfig.model_validate({**plain, "tune": {**plain["tune"], **tune}})
    backbone, objective = load_backbone(folder), Anchored(beta=0.4, normalise="l1")
    prepare_policy(config, backbone, objective)
    moved(backbone, 2)
    source = Source(backbone)
    batch = source.batch([0, 1])
    draws = make_draws(config, backbone.process, 1, [0, 1], batch.group_ids, batch.latents.shape)
    preference_step(config, objective, backbone, batch, draws, source.unconditional, None)
    group = Anchored.seen.pop()

    # ---- The same from whole predictions in numpy ----
    assert draws.noise is not None
    times = draws.times.repeat_interleave(3)
    latents, noise = batch.latents.flatten(0, 1), draws.noise.flatten(0, 1)
    noisy, target = backbone.process.add_noise(latents, noise, times), backbone.process.target(latents, noise, times)
    conditioning = {name: value.repeat_interleave(3, dim=0) for name, value in batch.conditioning.items()}
    found: dict[str, np.ndarray] = {"target": target.numpy()}
    for role in ("policy", "reference", "base"):
        with torch.no_grad(), backbone.role(role):
            found[role] = backbone.predict(noisy, times, conditioning).numpy()
    assert not np.allclose(found["policy"], found["base"], atol=1e-3)
    assert np.array_equal(found["reference"], found["base"]) == (reference == "base" or kind == "full")

    def mean(values: np.ndarray) -> np.ndarray:
        return np.asarray(values.mean(axis=(1, 2, 3)).reshape(2, 3))

    def close(ours: Tensor | None, theirs: np.ndarray) -> None:
        assert ours is not None
        np.testing.assert_allclose(ours.detach().numpy(), theirs, rtol=1e-4)

    scale = backbone.process.error_scale(draws.times, "x0").numpy()[:, None]
    close(group.anchor_gap, mean((found["policy"] - found["base"]) ** 2))
    close(group.prediction_gap, scale * mean((found["policy"] - found["reference"]) ** 2))
    assert group.policy_l1 is not None
    for place, share in enumerate((0.4, -0.4)):
        mixed = share * found["policy"] + (1 - share) * found["reference"] - found["target"]
        close(group.policy_l1[:, :, place], np.sqrt(scale) * mean(np.abs(mixed)))
    assert group.time is not None and bool(((group.time > 0) & (group.time <= 1)).all())
    assert replace(objective, anchor=0.0).needs_anchor_gap is False
