"""The sampler that training unrolls is the diffusers pipeline's own, to the last latents, or it is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from diffalign.config import load_reward_gradient_config
from diffalign.data.prompts import PromptRow
from diffalign.errors import DiffalignError
from diffalign.pipelines import load_backbone
from diffalign.pipelines.own_sampler import reason_not_followed
from diffalign.pipelines.schedulers import replace_scheduler
from diffalign.stages.reward_gradient import reward_gradient
from diffalign.training.prompt_source import PromptSource
from diffalign.training.reward_gradient.step import UnrolledSampler

TEXTS, SEEDS, SCALE = ["a red circle", "snow"], [3, 4], 4.0
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
DDIM = {"clip_sample": False, "set_alpha_to_one": False}
V_ZERO = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}

DIFFUSION: dict[str, tuple[str, dict[str, Any], bool]] = {
    # name -> class, settings, whether training follows it
    "euler-leading": ("EulerDiscreteScheduler", {"timestep_spacing": "leading"}, True),
    "euler-trailing": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}, True),
    "euler-linspace": ("EulerDiscreteScheduler", {"timestep_spacing": "linspace"}, True),
    "euler-karras": ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "use_karras_sigmas": True}, True),
    "euler-karras-linspace": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, True),
    "euler-beta": ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "use_beta_sigmas": True}, True),
    "euler-exponential": ("EulerDiscreteScheduler", {"use_exponential_sigmas": True}, True),
    "euler-v-zero-snr": ("EulerDiscreteScheduler", V_ZERO, True),
    "euler-sigma-min": ("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min"}, False),
    "euler-sigma-max": ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "sigma_max": 10.0}, False),
    "ddim-leading": ("DDIMScheduler", DDIM, True),
    "ddim-to-one": ("DDIMScheduler", {**DDIM, "set_alpha_to_one": True}, True),
    "ddim-trailing": ("DDIMScheduler", {**DDIM, "timestep_spacing": "trailing"}, True),
    "ddim-linspace": ("DDIMScheduler", {**DDIM, "timestep_spacing": "linspace"}, True),
    "ddim-v-zero-snr": ("DDIMScheduler", {**DDIM, **V_ZERO}, True),
    "ddim-clipped": ("DDIMScheduler", {"clip_sample": True}, False),
    "ddim-thresholded": ("DDIMScheduler", {**DDIM, "thresholding": True}, False),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}, False),
    "dpmpp": ("DPMSolverMultistepScheduler", {}, False),
    "dpmpp-karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, False),
    "unipc": ("UniPCMultistepScheduler", {}, False),
    "heun": ("HeunDiscreteScheduler", {}, False),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", {}, False),
    "lcm": ("LCMScheduler", {}, False),
    "ddpm": ("DDPMScheduler", {}, False),
}
FLOW: dict[str, tuple[str, dict[str, Any], bool]] = {
    "flow": ("FlowMatchEulerDiscreteScheduler", {}, True),
    "flow-terminal": ("FlowMatchEulerDiscreteScheduler", {"shift_terminal": 0.1}, True),
    "flow-karras": ("FlowMatchEulerDiscreteScheduler", {"use_karras_sigmas": True}, True),
    "flow-beta": ("FlowMatchEulerDiscreteScheduler", {"use_beta_sigmas": True}, True),
    "flow-exponential": ("FlowMatchEulerDiscreteScheduler", {"use_exponential_sigmas": True}, True),
    "flow-stochastic": ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, False),
    "flow-inverted": ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, False),
    "flow-heun": ("FlowMatchHeunDiscreteScheduler", {}, False),
    "flow-lcm": ("FlowMatchLCMScheduler", {}, False),
}
CASES = [(family, name) for family in ("sd15", "sdxl") for name in DIFFUSION]
CASES += [("sd3", name) for name in FLOW]
CASES += [("flux", name) for name in FLOW if name not in ("flow-heun", "flow-lcm")]  # these have no dynamic shift


def with_scheduler(backbone: Any, family: str, name: str) -> bool:
    """Give the backbone a scheduler of the table; return whether training should follow it."""
    kind, settings, followed = {**DIFFUSION, **FLOW}[name]
    given: dict[str, Any] = BETAS if name in DIFFUSION else {"shift": 3.0}
    if family == "flux":
        given = given | {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
    backbone.pipeline.scheduler = getattr(diffusers, kind)(**{**given, **settings})
    backbone.process = backbone.build_process(backbone.pipeline.scheduler)
    return followed


@pytest.fixture(scope="module")
def backbones(sd15_dir: Path, sdxl_dir: Path, sd3_dir: Path, flux_dir: Path) -> dict[str, Any]:
    """One backbone a family; each test gives it a scheduler."""
    return {
        family: load_backbone(folder)
        for family, folder in (("sd15", sd15_dir), ("sdxl", sdxl_dir), ("sd3", sd3_dir), ("flux", flux_dir))
    }


@pytest.mark.parametrize(("family", "name"), CASES)
def test_training_draws_as_the_pipeline_or_refuses(backbones: dict[str, Any], family: str, name: str) -> None:
    """Six and seven steps, of which neither divides 1000: there DDIM's steps do not lead to the next time."""
    backbone = backbones[family]
    followed = with_scheduler(backbone, family, name)
    kind = type(backbone.pipeline.scheduler).__name__
    if not followed:
        with pytest.raises(DiffalignError, match=f"{kind}.*set sampler.scheduler="):
            backbone.sampling_times(6, 64, 64)
        return
    source = PromptSource(backbone, [PromptRow(text) for text in TEXTS], cache=True)
    empty = {key: value.expand(2, *value.shape[1:]) for key, value in source.unconditional.items()}
    shape = (1, backbone.latent_channels, 8, 8)
    noise = torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in SEEDS])
    scale = backbone.guidance or SCALE
    for steps in (6, 7):
        found = backbone.sampler_steps(steps, 64, 64)
        sampler = UnrolledSampler(
            backbone, torch.cat([found.times, found.stops[-1:]]), source.batch([0, 1]), empty, scale, found.stops
        )
        rolled = sampler.roll(backbone.process.initial(noise), steps)
        own = backbone.sample(
            TEXTS, SEEDS, steps=steps, guidance_scale=scale, height=64, width=64, output_type="latent"
        )
        assert float((rolled - own).norm() / own.norm()) < 1e-4


@pytest.mark.parametrize(("family", "name"), [case for case in CASES if not {**DIFFUSION, **FLOW}[case[1]][2]])
def test_what_the_refusal_says_to_set_works(backbones: dict[str, Any], family: str, name: str) -> None:
    """The scheduler that the message names, with its options, is followed, and clips no latents."""
    import yaml

    backbone = backbones[family]
    with_scheduler(backbone, family, name)
    reason = reason_not_followed(backbone.pipeline.scheduler)
    assert reason is not None
    named = yaml.safe_load(reason.split("set sampler.scheduler=")[1])
    wanted = {"name": named} if isinstance(named, str) else named
    replace_scheduler(backbone.pipeline, wanted["name"], wanted.get("options", {}))
    assert reason_not_followed(backbone.pipeline.scheduler) is None


def test_the_verb_refuses_before_rewards_and_prompts(sd15_dir: Path, tmp_path: Path) -> None:
    """In a dry run and in the run itself; with the setting that the message names, the dry run passes."""
    backbone: Any = load_backbone(sd15_dir)
    replace_scheduler(backbone.pipeline, "dpmpp", {})
    backbone.pipeline.save_pretrained(tmp_path / "model")
    (tmp_path / "p.txt").write_text("a red circle\nsnow\n")
    (tmp_path / "c.yaml").write_text(
        f"run_dir: {tmp_path / 'run'}\ndevice: cpu\nmodel: {{path: {tmp_path / 'model'}}}\nprompts: {tmp_path / 'p.txt'}\n"
        "rewards: [{name: sharpness}]\nsampler: {steps: 4}\ntracking: {trackers: []}\n"
    )
    config = load_reward_gradient_config(tmp_path / "c.yaml")
    for dry in (True, False):
        with pytest.raises(DiffalignError, match="DPMSolverMultistepScheduler.*sampler.scheduler=ddim"):
            reward_gradient(config, dry_run=dry)
    assert not (tmp_path / "run").exists()
    reward_gradient(load_reward_gradient_config(tmp_path / "c.yaml", ["sampler.scheduler.name=ddim"]), dry_run=True)
