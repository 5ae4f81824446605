"""The noise of an image: what its seed gives, and whether the sampler adds any, against plain diffusers pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign.pipelines import load_backbone
from diffalign.pipelines.drawn_noise import initial_noise
from diffalign.pipelines.settings import SamplingSettings

SETTINGS = SamplingSettings(steps=3, guidance_scale=3.0, height=32, width=32)


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux"])
def test_an_image_is_drawn_from_the_noise_of_its_seed(family: str, request: pytest.FixtureRequest) -> None:
    """The pipeline gets the noise itself, and another generator: the same latents as from the seed."""
    backbone = load_backbone(request.getfixturevalue(f"{family}_dir"))
    record = backbone.noise_record(SETTINGS)
    assert record["exact"] and record["family"] == family and record["reason"] == ""
    drawn = backbone.sample(["a dog", "a cat"], [7, 2**32 - 1], SETTINGS, output_type="latent")
    assert list(drawn.shape[1:]) == record["shape"]
    noise = backbone.to_pipeline(initial_noise([7, 2**32 - 1], record["shape"]))
    pipeline: Any = backbone.pipeline
    arguments = {**backbone.guidance_arguments(3.0), **backbone.sampling_options()}
    again = pipeline(
        prompt=["a dog", "a cat"], latents=noise, num_inference_steps=3, height=32, width=32, output_type="latent",
        generator=torch.Generator().manual_seed(1), **arguments,
    ).images  # fmt: skip
    again = backbone.from_pipeline(again, *record["shape"][1:])
    torch.testing.assert_close(drawn, again.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "name", "options"),
    [
        *(("sd15", name, {}) for name in ("ddim", "ddpm", "dpmpp", "euler", "euler_ancestral", "heun", "unipc")),
        ("sd15", "dpmpp", {"algorithm_type": "sde-dpmsolver++"}),
        ("sd3", "flow_euler", {}),
        ("sd3", "flow_euler", {"stochastic_sampling": True}),
        ("sd3", "flow_heun", {}),
    ],
)
def test_whether_a_sampler_adds_noise_is_told_by_drawing_twice(
    family: str, name: str, options: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    backbone = load_backbone(request.getfixturevalue(f"{family}_dir"))
    backbone.use_scheduler(name, options)
    record = backbone.noise_record(SETTINGS)
    pipeline: Any = backbone.pipeline
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)  # a flow's steps draw from the global generator
        found.append(
            pipeline(
                prompt=["a dog"], latents=backbone.to_pipeline(initial_noise([7], record["shape"])), height=32, width=32,
                num_inference_steps=3, output_type="latent", generator=torch.Generator().manual_seed(seed),
            ).images
        )  # fmt: skip
    assert torch.equal(*found) == record["exact"], record
    assert bool(record["reason"]) != record["exact"]


def test_the_folder_says_what_is_not_known(tmp_path: Path, sd3_dir: Path) -> None:
    backbone = load_backbone(sd3_dir)
    backbone.use_scheduler("flow_euler", {"stochastic_sampling": True})
    reason = backbone.noise_record(SETTINGS)["reason"]
    assert reason == "FlowMatchEulerDiscreteScheduler with stochastic_sampling=True draws noise in its steps"
