"""`diffalign train` with `train.online`: prompts, rewards and a model to trained weights, on images drawn meanwhile."""

from collections.abc import Mapping
from pathlib import Path

import torch

from diffalign.config import OnlineSection, TrainConfig
from diffalign.data.cache import prompt_embeddings, prompt_key
from diffalign.data.prompts import PromptRow, unique_prompts
from diffalign.errors import DiffalignError
from diffalign.pipelines import Backbone
from diffalign.pipelines.own_sampler import reason_not_followed
from diffalign.pipelines.paths import PathSteps
from diffalign.pipelines.settings import SamplingSettings
from diffalign.progress import say
from diffalign.rewards import Reward
from diffalign.stages.checks import check_validation, check_weights
from diffalign.stages.describe_training import describe_training
from diffalign.stages.dry_run import TIME_UNKNOWN, print_facts, warn
from diffalign.stages.fingerprints import of_model, of_prompts
from diffalign.stages.micro_batch import open_fitting
from diffalign.stages.resolve import (
    check_guidance_scale,
    open_validation,
    planned_backbone,
    resolve_prompts,
)
from diffalign.stages.resolve_rewards import open_rewards, process_device, settled_rewards
from diffalign.stages.trainer import run_and_report
from diffalign.training.checkpoint import check_before_loading
from diffalign.training.device import precision_of, start_accelerator
from diffalign.training.preference.drawn_groups import DrawnGroups
from diffalign.training.preference.method import Preference
from diffalign.training.preference.online import Online
from diffalign.training.preference.samplers import PathSampler, PipelineSampler, Sampler

PROMPTS = "train.online.prompts"


def train_online(config: TrainConfig, online: OnlineSection, device: str, dry_run: bool) -> None:
    """Train on images that the run draws itself, or print what that would do. config: with its rewards of validation settled.

    Raises DiffalignError for prompts that cannot be read, a reward that cannot judge one, labels that no reward makes, and
    settings that the model cannot have.
    """
    # ---- What can be wrong is found before a model is loaded ----
    rewards = settled_rewards(online.rewards, config.model.path, online.prompts, "train.online.rewards")
    online = online.model_copy(update={"rewards": rewards})
    config = config.model_copy(update={"train": config.train.model_copy(update={"online": online})})
    rows = unique_prompts(resolve_prompts(online.prompts, online.n, config.seed))
    judges = open_rewards(rewards, rows, process_device(config.device), "train.online.rewards", online.prompts)
    check_labels_are_made(config, judges)
    said = check_weights(judges, dry_run)
    judged, held_out = check_validation(config.validation, device, dry_run)
    if dry_run:
        _describe(config, online, rows, device, said | held_out)
        return
    accelerator = start_accelerator(config)
    resolved = {
        "train.mixed_precision": precision_of(config, cuda=accelerator.device.type == "cuda"),
        PROMPTS: of_prompts(rows)["prompts"],
    }
    check_before_loading(config, resolved)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)

    # ---- Model, and everything that its text encoders are needed for ----
    config, backbone = open_fitting(config, online.images_per_prompt, accelerator)
    check_guidance_scale(online.guidance_scale, backbone, "train.online.guidance_scale")
    side = config.data.resolution or backbone.default_resolution
    drawn = SamplingSettings(online.steps, online.guidance_scale, online.negative_prompt, side, side)
    check_noise(config, backbone, drawn)
    exact, folder = config.data.cache_dtype == "float32", config.data.cache_dir or Path(config.run_dir) / "cache"
    texts = [row.prompt for row in rows]
    cache = folder / prompt_key(texts, backbone, exact)
    embeddings = prompt_embeddings(texts, backbone, cache, config.data.cache, exact, say)
    template = backbone.encode_guided([""], online.negative_prompt)
    wanted = config.validation
    sampling = SamplingSettings(wanted.steps, wanted.guidance_scale, wanted.negative_prompt, side, side)
    validation = (
        None
        if judged is None
        else open_validation(wanted, backbone, judged.rows, judged.rewards, config.seed, sampling)
    )
    backbone.drop_encoders(keep_vae=True, keep_text=config.data.cache != "all")

    # ---- The run ----
    places = side // backbone.vae_scale_factor
    shapes: dict[str, tuple[int, ...]] = {"latents": (backbone.latent_channels, places, places)}
    sampler: Sampler = PipelineSampler(backbone, drawn, template)
    steps = path_steps(config, online, backbone, side) if config.noise == "path" else None
    if steps is not None:
        sampler = PathSampler(backbone, steps, embeddings.unconditional, shapes["latents"])
        shapes["path"] = (len(steps.times) + 1, *shapes["latents"])
    tracked = config.noise == "tracked"
    groups = DrawnGroups(rows, embeddings, online, config.seed, shapes, tracked=tracked, steps=steps)
    loop = Online(config, backbone, groups, judges, sampler, accelerator, say)
    method = Preference(config, backbone, groups, accelerator, say, online=loop)
    resolved |= of_model(backbone, config.tune)
    run_and_report(config, method, validation=validation, resolved=resolved)


def check_labels_are_made(config: TrainConfig, rewards: Mapping[str, Reward]) -> None:
    """Refuse labels that none of the rewards makes."""
    combine = config.labels.combine
    names = [f"scores.{name}" for name in (*combine.weights, *combine.gates)] if combine else [config.labels.source]
    for name in names:
        _, label, *column = name.split(".")
        if label not in rewards:
            raise DiffalignError(
                f"labels.source: {name} is asked for, and train.online.rewards has {', '.join(rewards)}; add {label} to them"
            )
        if column and column[0] not in rewards[label].columns:
            raise DiffalignError(
                f"labels.source: {label} has no column {column[0]}; it has {', '.join(rewards[label].columns)}"
            )


def check_noise(config: TrainConfig, backbone: Backbone, settings: SamplingSettings) -> None:
    """Refuse `noise: tracked` where the images do not follow from the noise of their seeds alone."""
    record = backbone.noise_record(settings)
    if config.noise == "tracked" and not record["exact"]:
        raise DiffalignError(
            f"noise=tracked: {record['reason']}; set noise=shared, or another scheduler in the model's folder"
        )


def path_steps(config: TrainConfig, online: OnlineSection, backbone: Backbone, side: int) -> PathSteps:
    """Return the steps of paths for `noise: path`. Raises DiffalignError for a sampler whose steps cannot be repeated."""
    if reason := reason_not_followed(backbone.pipeline.scheduler):
        raise DiffalignError(
            f"noise=path, {config.model.path}: {reason.partition(';')[0]}; give the model DDIM or Euler"
        )
    first, end = online.path.steps_of(online.steps)
    guidance = 1.0 if backbone.guided else online.guidance_scale
    sampler = backbone.sampler_steps(online.steps, side, side)
    return PathSteps(sampler, first, end, online.path.noise_level, guidance)


def _describe(
    config: TrainConfig, online: OnlineSection, rows: list[PromptRow], device: str, judges: dict[str, str]
) -> None:
    """Print what a run would do, from the files alone: nothing is written or downloaded, no GPU memory is taken."""
    draws, images = -(-config.train.steps // online.every), online.groups * online.images_per_prompt
    print_facts("run", {
        "device": device,
        "prompts": len(rows),
        "a draw": f"{online.groups} prompts x {online.images_per_prompt} images = {images}, {online.steps} steps each",
        "draws": f"{draws}, {draws * images} images in all",
        "updates": f"{config.train.steps} x {config.train.groups_per_step} groups, {online.every} on a draw",
        "time": TIME_UNKNOWN,
    })  # fmt: skip
    if config.validation.every is None:
        warn(
            "no validation: rewards that are trained on can be exploited; set validation.every and validation.prompts=FILE"
        )
    describe_training(config, planned_backbone(config.model), online.images_per_prompt, device, judges)
