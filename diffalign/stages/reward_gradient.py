"""`diffalign reward-gradient`: prompts, a model and differentiable rewards to a model that scores higher."""

import torch
from torch import Tensor

from diffalign.config import RewardGradientConfig
from diffalign.data.cut_prompts import cut_lines
from diffalign.data.prompts import PromptRow, unique_prompts
from diffalign.errors import DiffalignError
from diffalign.files.lock import writing_folder
from diffalign.pipelines import Backbone
from diffalign.pipelines.own_sampler import reason_not_followed
from diffalign.pipelines.settings import SamplingSettings
from diffalign.progress import say
from diffalign.rewards import REWARDS, Reward, find_reward, foreign_rewards
from diffalign.stages.checks import check_packages, check_validation, check_weights
from diffalign.stages.dry_run import TIME_UNKNOWN, count_trainable, model_facts, print_config, print_facts, print_where
from diffalign.stages.fingerprints import of_model, of_prompts
from diffalign.stages.resolve import (
    check_guidance_scale,
    note_other_base,
    open_backbone,
    open_validation,
    planned_backbone,
    resolve_prompts,
    settled,
    with_judges,
)
from diffalign.stages.resolve_rewards import open_rewards, process_device, resolve_device
from diffalign.stages.trainer import run_and_report
from diffalign.training.checkpoint import check_before_loading
from diffalign.training.device import start_accelerator
from diffalign.training.prompt_source import PromptSource
from diffalign.training.protocols import LatentScores
from diffalign.training.reward_gradient.draws import late_steps
from diffalign.training.reward_gradient.method import RewardGradient


def check_differentiable(config: RewardGradientConfig) -> None:
    """Refuse a reward without a gradient, before a model is loaded. Raises DiffalignError."""
    for term in config.rewards:
        if not find_reward(term.name).differentiable:
            known = ", ".join(name for name, kind in (REWARDS | foreign_rewards()[0]).items() if kind.differentiable)
            raise DiffalignError(
                f"rewards: {term.name} is not differentiable, so it has no gradient to follow; these are: {known}. Rewards "
                "without one can rank images for `diffalign train`, or steer `diffalign distill`"
            )


def gradient_scores(
    config: RewardGradientConfig, backbone: Backbone, rows: list[PromptRow], rewards: dict[str, Reward]
) -> LatentScores:
    """Return a function that decodes latents and scores them and keeps the gradient. The VAE stays in float32 from here."""
    vae = backbone.pipeline.vae.float()
    if config.decoder.checkpointing and vae._supports_gradient_checkpointing:  # DC-AE's code does not
        vae.enable_gradient_checkpointing()

    def scores(latents: Tensor, indices: list[int]) -> dict[str, Tensor]:
        vae.to(backbone.device)  # a validation puts it back into the CPU's memory
        vae.use_tiling = config.decoder.tiling  # and turns tiling off
        pixels, texts = backbone.decode_latents(latents), [rows[i].prompt for i in indices]
        return {name: reward.score_tensors(pixels, texts) for name, reward in rewards.items()}

    return scores


def check_sampler(config: RewardGradientConfig, backbone: Backbone) -> int:
    """Give the backbone the sampler that the config names, and return the side of the images in pixels.

    Raises DiffalignError for a side that the model cannot draw, another guidance than the network's, and a sampler whose
    steps training cannot repeat.
    """
    wanted = config.sampler.scheduler
    if wanted is not None:
        backbone.use_scheduler(wanted.name, wanted.options)
    if reason := reason_not_followed(backbone.pipeline.scheduler):
        raise DiffalignError(f"{config.model.path}: {reason}")
    side = config.resolution or int(backbone.default_resolution)
    if side % backbone.pixel_multiple:
        raise DiffalignError(f"resolution={side}: this model needs a multiple of {backbone.pixel_multiple}")
    check_guidance_scale(config.sampler.guidance_scale, backbone, "sampler.guidance_scale")
    return side


def reward_gradient(config: RewardGradientConfig, dry_run: bool = False) -> None:
    """Train a model on the gradient of rewards: `diffalign reward-gradient`. The same command resumes where it stopped."""
    with writing_folder(None if dry_run else config.run_dir, "run_dir"):
        _reward_gradient(config, dry_run)


def _reward_gradient(config: RewardGradientConfig, dry_run: bool) -> None:
    config = with_judges(settled(config), tuple(term.name for term in config.rewards))
    device = resolve_device(config.device)
    if dry_run:
        print_config(config)
    else:
        check_packages(config)
    check_before_loading(config)
    check_differentiable(config)
    rows = unique_prompts(resolve_prompts(config.prompts, config.n))
    rewards = open_rewards(config.rewards, rows, process_device(config.device), "rewards", config.prompts)
    followed = check_weights(rewards, dry_run)
    judged, judges = check_validation(config.validation, device, dry_run)
    if dry_run:
        _describe(config, rows, device, followed | judges)
        return
    accelerator = start_accelerator(config)
    resolved = {"train.mixed_precision": accelerator.mixed_precision, **of_prompts(rows)}
    check_before_loading(config, resolved)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    note_other_base(config.tune.init, config.model)
    backbone = open_backbone(config.model, str(accelerator.device))
    side = check_sampler(config, backbone)
    scores = gradient_scores(config, backbone, rows, rewards)
    sampler = config.sampler
    drawn = SamplingSettings(sampler.steps, sampler.guidance_scale, height=side, width=side)
    validation = (
        None
        if judged is None
        else open_validation(config.validation, backbone, judged.rows, judged.rewards, config.seed, drawn)
    )
    if validation is not None:
        # What is followed as well need not be in memory twice.
        same = [
            s.label
            for s in config.validation.rewards
            for r in config.rewards
            if (s.name, s.options) == (r.name, r.options)
        ]
        validation.rewards.update({name: rewards[name] for name in same})
    for line in cut_lines({"the model": backbone}, [row.prompt for row in rows]):
        say(line)
    source = PromptSource(backbone, rows, cache=config.train.cache_prompts)
    if config.train.cache_prompts:
        backbone.drop_encoders(keep_vae=True)
    places = side // backbone.vae_scale_factor
    method = RewardGradient(config, backbone, source, (backbone.latent_channels, places, places), scores, accelerator)
    resolved |= of_model(backbone, config.tune)
    run_and_report(config, method, validation=validation, resolved=resolved)


def describe_steps(config: RewardGradientConfig) -> str:
    """Say which of the sampler's steps carry a gradient, in words; counted from 0."""
    method, steps = config.method, config.sampler.steps
    if method.name == "refl":
        low, high = method.between or late_steps(steps)
        more = f", and {method.depth - 1} before it" if method.depth > 1 else ""
        return f"one of {low} to {high}{more}; its x0 is judged"
    if method.name == "draft":
        return f"the last {method.last or steps}"
    if method.name == "alignprop":
        low, high = method.last or (1, steps)
        return f"the last {low} to {high}"
    return f"the last, from {method.noises} noises"


def _describe(config: RewardGradientConfig, rows: list[PromptRow], device: str, judges: dict[str, str]) -> None:
    """Print what a run would do, from the files alone: nothing is written or downloaded, no GPU memory is taken."""
    run: dict[str, object] = {
        "device": device,
        "prompts": len(rows),
        "images": f"{config.train.steps} x {config.train.images_per_step}",
        "steps with a gradient": describe_steps(config),
        "rewards": ", ".join(f"{term.weight:g} x {term.name}" for term in config.rewards),
        "time": TIME_UNKNOWN,
    }
    backbone = planned_backbone(config.model)
    model = model_facts(backbone, config.model)
    if backbone is not None:
        side = check_sampler(config, backbone)
        times = backbone.sampling_times(config.sampler.steps, side, side)
        run["images"] = f"{run['images']} of {side} x {side} pixels"
        run["sampler"] = f"{config.sampler.steps} steps from {times[0]:.4g} to {times[-2]:.4g}"
        model["trainable"] = f"{count_trainable(backbone, config.tune):,}"
    print_facts("run", run)
    print_facts("model", model)
    print_facts("rewards", judges)
    print_where(config.model, model)
    check_packages(config)
