"""Combinations of values that cannot work in a distillation's config; see `config_checks.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffalign.config.checks import check_model, refuse

if TYPE_CHECKING:
    from diffalign.config.distill import DistillConfig


def check_distillation(config: DistillConfig) -> None:
    group, reward, student, match = config.group, config.reward, config.student, config.match
    groups, micro = config.train.groups_per_step, config.train.micro_batch
    if groups % micro:
        refuse(
            f"{micro} does not divide train.groups_per_step={groups}, and every forward pass takes the same number of "
            "whole groups; use one that does",
            "train.micro_batch",
            "train.groups_per_step",
        )
    if group.axis == "none" and group.size != 1:
        refuse(
            "without an axis there are no groups; set group.size=1, or group.axis=prompt", "group.size", "group.axis"
        )
    compared = bool(reward.terms) or group.advantage != "none"
    if compared and (group.axis != "prompt" or group.size < 2):
        refuse(
            "advantages compare the images of one prompt; set group.axis=prompt and group.size=2 or more",
            "group.size",
            "group.axis",
        )
    if compared and reward.use != "exponential" and match.guidance == 1.0:
        refuse("advantages multiply the guidance's part, and match.guidance=1 leaves none", "match.guidance")
    if reward.use == "exponential" and (len(reward.terms) != 1 or group.advantage != "none"):
        refuse("exponential takes exactly one reward and no other advantage", "reward.use", "reward.terms")
    if reward.use == "raw" and reward.start_step == 0:
        refuse(
            "raw leaves no guidance where A is 0, so a student that cannot yet draw never learns to; set reward.start_step "
            "to where it can, or use factor",
            "reward.use",
            "reward.start_step",
        )
    stochastic = student.sampler == "renoise" or (student.sampler == "cps" and student.eta > 0)
    if reward.policy_weight and (not compared or not stochastic or student.steps == 1):
        refuse(
            "PPO needs advantages and a stochastic step: reward.terms, student.sampler=renoise or cps, two steps or more",
            "reward.policy_weight",
            "student.sampler",
        )
    if reward.policy_reuse and not reward.policy_weight:
        refuse("further updates are PPO's; set reward.policy_weight", "reward.policy_reuse", "reward.policy_weight")
    if reward.gradient_weight and not reward.terms:
        refuse("there is no reward to take a gradient of; give reward.terms", "reward.gradient_weight")
    if bool(config.gan.weight) != (config.gan.real is not None):
        refuse("real images and their weight go together: set gan.weight=0.005 and gan.real=FOLDER, or neither", "gan")
    if len({term.name for term in reward.terms}) < len(reward.terms):
        refuse("a reward is named twice", "reward.terms")
    if match.low >= match.high:
        refuse("low must lie below high", "match.low", "match.high")
    if student.times is not None and len(student.times) != student.steps:
        refuse(f"{len(student.times)} times for {student.steps} steps", "student.times", "student.steps")
    if student.sampler == "cps" and config.validation.every is not None:
        refuse("diffusers has no CPS scheduler to draw validation images with; leave it out", "validation.every")
    if student.times is not None and config.validation.every is not None:
        refuse(
            "validation draws on the model's own grid; leave student.times or validation.every out", "validation.every"
        )
    if config.validation.every is not None and config.validation.prompts is None:
        refuse("validation draws images of prompts, and none are given", "validation.prompts", "validation.every")
    for name, section in (("optimizer", config.optimizer), ("fake.optimizer", config.fake.optimizer)):
        if section.warmup_steps >= config.train.steps:
            refuse(f"the warm-up does not end within train.steps={config.train.steps}", f"{name}.warmup_steps")
    if config.tune.kind == "full" and (config.tune.init is not None or config.tune.targets is not None):
        refuse("init and targets belong to a LoRA; leave them out with tune.kind=full", "tune.kind")
    check_model(config.model, config.device, autocast=config.train.mixed_precision != "no")
