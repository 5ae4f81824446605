"""Combinations of values that cannot work in a reward gradient's config; see `config_checks.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffalign.config.checks import check_model, refuse

if TYPE_CHECKING:
    from diffalign.config.reward_gradient import RewardGradientConfig


def check_reward_gradient(config: RewardGradientConfig) -> None:
    images, micro, steps = config.train.images_per_step, config.train.micro_batch, config.sampler.steps
    if images % micro:
        refuse(
            f"{micro} does not divide train.images_per_step={images}, and every forward pass takes the same number of "
            "images; use one that does",
            "train.micro_batch",
            "train.images_per_step",
        )
    method = config.method
    if method.name == "refl" and method.between is not None:
        low, high = method.between
        if not 0 <= low <= high < steps:
            refuse(
                f"steps are counted from 0, so with sampler.steps={steps} two rising numbers of 0 to {steps - 1} are needed, "
                f"not [{low}, {high}]",
                "method.between",
                "sampler.steps",
            )
    if method.name == "draft" and method.last is not None and method.last > steps:
        refuse(f"the sampler has {steps} steps; use so many, or null for all", "method.last", "sampler.steps")
    if method.name == "alignprop" and method.last is not None:
        fewest, most = method.last
        if not 1 <= fewest <= most <= steps:
            refuse(
                f"two rising numbers of 1 to sampler.steps={steps} are needed, not [{fewest}, {most}]",
                "method.last",
                "sampler.steps",
            )
    if len({term.name for term in config.rewards}) < len(config.rewards):
        refuse("a reward is named twice", "rewards")
    for term in config.rewards:
        if (term.form == "relu") != (term.threshold is not None):
            refuse(
                f"{term.name}: form=relu and a threshold go together; give both, or form=linear with neither", "rewards"
            )
    if config.validation.every is not None and config.validation.prompts is None:
        refuse("validation draws images of prompts, and none are given", "validation.prompts", "validation.every")
    if config.optimizer.warmup_steps >= config.train.steps:
        refuse(f"the warm-up does not end within train.steps={config.train.steps}", "optimizer.warmup_steps")
    if not all(0 <= beta < 1 for beta in config.optimizer.betas):
        refuse("both betas must lie in [0, 1)", "optimizer.betas")
    if config.tune.kind == "full" and (config.tune.init is not None or config.tune.targets is not None):
        refuse("init and targets belong to a LoRA; leave them out with tune.kind=full", "tune.kind")
    if config.tune.kind == "full" and config.model.dtype == "float16":
        refuse(
            "full fine-tuning updates the weights themselves, and float16 loses the updates; use float32, with "
            "train.mixed_precision for speed",
            "model.dtype",
            "tune.kind",
        )
    check_model(config.model, config.device, autocast=config.train.mixed_precision != "no")
