"""Combinations of values that cannot work, each with the keys to blame and the way out.

An error here is a pydantic error of type `combination`; its context lists the keys, for naming the line.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NoReturn

from pydantic_core import PydanticCustomError

from diffalign.config_objectives import SmPOSection

if TYPE_CHECKING:
    from diffalign.config_distill import DistillConfig
    from diffalign.config_reward_gradient import RewardGradientConfig
    from diffalign.config_schema import (
        CombineSection,
        EvalConfig,
        ModelSection,
        SampleConfig,
        TrainConfig,
    )
    from diffalign.config_synth import RankSection, SynthConfig

COMBINATION = "combination"
STATISTICS = {"minmax": {"min", "max"}, "zscore": {"mean", "std"}}


def _refuse(message: str, *keys: str) -> NoReturn:
    """`keys`, dotted, the likeliest culprit first."""
    raise PydanticCustomError(COMBINATION, "{message}", {"message": message, "keys": keys})


def refuse(message: str, *keys: str) -> NoReturn:
    """For sections that keep their checks beside them."""
    _refuse(message, *keys)


def check_training(config: TrainConfig) -> None:
    _check_batches(config)
    _check_weights(config)
    _check_labels(config)
    _check_selection(config)
    _check_inversion(config)
    _check_reference(config)
    _check_model(config.model, config.device, autocast=config.train.mixed_precision != "no")
    times = config.times
    if times.sampler == "uniform" and (times.mean, times.std) != (0.0, 1.0):
        _refuse(
            "mean and std shape logit_normal times only; set times.sampler=logit_normal or leave them out",
            "times.mean",
            "times.std",
        )
    if config.optimizer.warmup_steps >= config.train.steps:
        _refuse(
            f"the warm-up of {config.optimizer.warmup_steps} steps does not end within "
            f"train.steps={config.train.steps}; shorten it",
            "optimizer.warmup_steps",
            "train.steps",
        )
    if not all(0 <= beta < 1 for beta in config.optimizer.betas):
        _refuse("both betas must lie in [0, 1)", "optimizer.betas")
    if config.validation.every is not None and config.validation.prompts is None:
        _refuse(
            "validation draws images of prompts, and none are given; set validation.prompts to a file, or "
            "validation.every=null",
            "validation.prompts",
            "validation.every",
        )
    if config.train.auto_beta is not None and config.objective.name not in ("dpo", "smpo"):
        _refuse(
            "auto_beta needs a beta and one margin a group that is proportional to it, as dpo and smpo have, not "
            f"{config.objective.name}; leave it out",
            "train.auto_beta",
            "objective.name",
        )
    if len(set(config.tracking.trackers)) < len(config.tracking.trackers):
        _refuse("a tracker is named twice", "tracking.trackers")


def _check_batches(config: TrainConfig) -> None:
    groups, micro = config.train.groups_per_step, config.train.micro_batch
    if groups % micro:
        fitting = ", ".join(str(n) for n in range(min(groups, micro), 0, -1) if groups % n == 0)
        _refuse(
            f"{micro} does not divide train.groups_per_step={groups}, and every forward pass takes the same number of "
            f"whole groups; use {fitting}",
            "train.micro_batch",
            "train.groups_per_step",
        )


def _check_weights(config: TrainConfig) -> None:
    if config.tune.reference == "base" and config.tune.init is None:
        _refuse(
            "without tune.init the reference is the base anyway; give tune.init or leave reference out",
            "tune.reference",
            "tune.init",
        )
    if config.tune.kind == "full":
        if config.tune.init is not None:
            _refuse(
                "init loads a LoRA, but tune.kind=full trains no LoRA; set tune.kind=lora or leave init out",
                "tune.init",
                "tune.kind",
            )
        if config.tune.targets is not None:
            _refuse(
                "targets choose where a LoRA goes, but tune.kind=full trains all weights; leave targets out",
                "tune.targets",
            )
        if config.model.dtype == "float16":
            _refuse(
                "full fine-tuning updates the weights themselves, and float16 loses the updates; use float32, with "
                "train.mixed_precision for speed",
                "model.dtype",
                "tune.kind",
            )
    if config.device == "cpu" and config.train.mixed_precision == "fp16":
        _refuse("fp16 needs a GPU; use no or bf16 with device=cpu", "train.mixed_precision", "device")


def _check_labels(config: TrainConfig) -> None:
    labels = config.labels
    if (labels.source == "combined") != (labels.combine is not None):
        _refuse(
            "source=combined and combine go together: labels.source=combined "
            "'labels.combine={weights: {geneval: 1.0, pickscore: 1.0}}' says how",
            "labels.source" if labels.combine is None else "labels.combine",
        )
    if labels.source == "preference" and labels.transform != "none":
        _refuse(
            f"preference holds vote shares already, transform={labels.transform} is for scores; set "
            "labels.source=scores.NAME or labels.transform=none",
            "labels.transform",
            "labels.source",
        )
    wanted = STATISTICS.get(labels.transform)
    if labels.combine is not None:
        _check_combination(labels.combine)
        if wanted is not None:
            _refuse(
                f"combined labels are scaled already, transform={labels.transform} is for one reward; use none, votes or "
                "balanced",
                "labels.transform",
                "labels.combine",
            )
        wanted = {f"{name}.{part}" for name in labels.combine.weights for part in ("mean", "std")}
    if labels.stats is not None and wanted is None:
        _refuse(
            f"statistics serve minmax, zscore and combined labels, not transform={labels.transform}; leave stats out",
            "labels.stats",
            "labels.transform",
        )
    objective = config.objective
    if (
        isinstance(objective, SmPOSection)
        and labels.source != "preference"
        and labels.transform in ("none", "zscore")
        and (objective.reward_min, objective.reward_max) == (0.0, 1.0)
    ):
        _refuse(
            "smpo compares scores between 0 and 1, and others would count as certain or as nothing; set "
            "labels.transform=minmax, or objective.reward_min and objective.reward_max to the reward's bounds",
            "labels.transform",
            "labels.source",
        )
    if labels.stats is not None and wanted is not None and set(labels.stats) != wanted:
        what = labels.transform if labels.combine is None else "source=combined"
        _refuse(f"{what} takes exactly {' and '.join(sorted(wanted))}", "labels.stats")


def _check_combination(combine: CombineSection) -> None:
    if any(weight < 0 for weight in combine.weights.values()) or not any(combine.weights.values()):
        _refuse(
            "a weight below 0 would vote against its own reward, and one at least must be above 0",
            "labels.combine.weights",
        )
    if (combine.how == "gated") != bool(combine.gates):
        _refuse(
            "how=gated and gates go together, as gates={geneval.exact: 1.0}",
            "labels.combine.gates",
            "labels.combine.how",
        )


def _check_selection(config: TrainConfig) -> None:
    selection, labels = config.selection, config.labels
    by_phase = selection.groups == "curriculum" or selection.images in ("rank_gap", "score_gap")
    if selection.phases != 3 and not by_phase:
        _refuse(
            "nothing goes by phases; set selection.groups=curriculum or selection.images=rank_gap, or leave it out",
            "selection.phases",
            "selection.groups",
        )
    if (selection.images == "variance") != (selection.sizes is not None):
        _refuse(
            "images=variance and sizes go together: selection.sizes=[4, 8] says how many images",
            "selection.sizes",
            "selection.images",
        )
    if selection.sizes is not None and min(selection.sizes) < 2:
        _refuse("a preference needs at least two images", "selection.sizes")
    if selection.images != "all" and config.data.group_size is not None:
        _refuse(
            f"selection.images={selection.images} chooses the images of a step, and data.group_size draws them; leave one "
            "out",
            "selection.images",
            "data.group_size",
        )
    centred = labels.transform in ("votes", "balanced") or (labels.combine is not None and labels.combine.how == "dvao")
    if selection.weight == "mean" and (labels.source == "preference" or centred):
        _refuse(
            "vote shares, dvao and balanced labels have the same mean in every group, so none would count more; set "
            "labels.source=scores.NAME, or selection.weight=gap",
            "selection.weight",
            "labels.source",
        )


def _check_inversion(config: TrainConfig) -> None:
    inversion = config.inversion
    changed = [key for key, value in type(inversion)().model_dump().items() if inversion.model_dump()[key] != value]
    if changed and config.noise != "inverted":
        _refuse(
            f"inversion has no effect with noise={config.noise}; set noise=inverted or leave it out",
            *(f"inversion.{key}" for key in changed),
            "noise",
        )
    if inversion.average_from > inversion.iterations:
        _refuse(
            f"a step has {inversion.iterations + 1} predictions, numbered from 0: none is left to average; use at most "
            f"inversion.iterations={inversion.iterations}",
            "inversion.average_from",
            "inversion.iterations",
        )


def _check_reference(config: TrainConfig) -> None:
    reference = config.reference
    if reference.store is None:
        if reference.keep != "errors":
            _refuse("keep says what goes into a store, and there is none; set reference.store", "reference.keep")
        return
    if config.noise == "inverted" and config.inversion.by == "policy":
        _refuse(
            "the noise is found by the policy, which is another one at every step, so nothing can be kept; set "
            "inversion.by=reference, or reference.store=null",
            "reference.store",
            "inversion.by",
        )
    if config.objective.name == "disco" and reference.keep == "errors":
        _refuse(
            "disco looks at the reference's predictions, not at its errors alone; set reference.keep=predictions",
            "reference.keep",
            "objective.name",
        )
    if config.objective.name in ("sft", "simpo") and config.noise != "inverted":
        _refuse(
            f"{config.objective.name} has no reference, and nothing would be kept; leave reference.store out",
            "reference.store",
            "objective.name",
        )


def _check_model(model: ModelSection, device: str, autocast: bool = False) -> None:
    if device == "cpu" and model.attention != "sdpa":
        _refuse(f"{model.attention} needs a GPU; use sdpa with device=cpu", "model.attention", "device")
    if model.attention == "flash" and model.dtype == "float32" and not autocast:
        _refuse(
            "flash attention has no float32 kernel; use model.dtype=bfloat16, or sdpa", "model.attention", "model.dtype"
        )


def _check_size(height: int | None, width: int | None) -> None:
    if (height is None) != (width is None):
        _refuse("give both height and width, or neither", "height" if width is None else "width")


def check_sampling(config: SampleConfig) -> None:
    _check_model(config.model, config.device)
    _check_size(config.height, config.width)


def check_evaluation(config: EvalConfig) -> None:
    for name in config.others:
        # Names become folders.
        if name in ("base", "tuned") or not re.fullmatch(r"[\w.+-]+", name) or set(name) == {"."}:
            _refuse(f"{name!r} is taken or no plain name; use letters, digits, dots and dashes", "others")
    names = [config.reward.name, *(reward.name for reward in config.more_rewards)]
    if len(set(names)) < len(names):
        _refuse("a reward is named twice", "more_rewards", "reward.name")
    _check_model(config.model, config.device)
    _check_size(config.height, config.width)


def check_ranking(rank: RankSection) -> None:
    if (rank.choose == "all") != (rank.k is None):
        _refuse("choose and k go together: choose=extremes, random or variance, and k=4 say", "choose", "k")
    if rank.splits is not None:
        if any(share < 0 for share in rank.splits.values()) or sum(rank.splits.values()) >= 1:
            _refuse("shares must be positive and leave some prompts to train", "splits")
        if "train" in rank.splits:
            _refuse("train gets what the other splits leave; name only those", "splits")
    unknown = set(rank.weights) - set(rank.sources or rank.weights)
    if unknown:
        _refuse(f"{sorted(unknown)[0]} is not among sources", "weights", "sources")
    if any(weight < 0 for weight in rank.weights.values()):
        _refuse("a weight below 0 would vote against its own reward", "weights")


def check_synth(config: SynthConfig) -> None:
    names = [generator.name for generator in config.generators]
    if len(set(names)) < len(names):
        _refuse("two generators have the same name", "generators")
    rewards = [reward.name for reward in config.rewards]
    if len(set(rewards)) < len(rewards):
        _refuse("a reward is named twice; its columns can vote separately, as rank.sources=[geneval.exact]", "rewards")
    for generator in config.generators:
        _check_model(generator.model, config.device)
        _check_size(generator.height, generator.width)


def check_distillation(config: DistillConfig) -> None:
    group, reward, student, match = config.group, config.reward, config.student, config.match
    groups, micro = config.train.groups_per_step, config.train.micro_batch
    if groups % micro:
        _refuse(
            f"{micro} does not divide train.groups_per_step={groups}, and every forward pass takes the same number of "
            "whole groups; use one that does",
            "train.micro_batch",
            "train.groups_per_step",
        )
    if group.axis == "none" and group.size != 1:
        _refuse(
            "without an axis there are no groups; set group.size=1, or group.axis=prompt", "group.size", "group.axis"
        )
    compared = bool(reward.terms) or group.advantage != "none"
    if compared and (group.axis != "prompt" or group.size < 2):
        _refuse(
            "advantages compare the images of one prompt; set group.axis=prompt and group.size=2 or more",
            "group.size",
            "group.axis",
        )
    if compared and reward.use != "exponential" and match.guidance == 1.0:
        _refuse("advantages multiply the guidance's part, and match.guidance=1 leaves none", "match.guidance")
    if reward.use == "exponential" and (len(reward.terms) != 1 or group.advantage != "none"):
        _refuse("exponential takes exactly one reward and no other advantage", "reward.use", "reward.terms")
    if reward.use == "raw" and reward.start_step == 0:
        _refuse(
            "raw leaves no guidance where A is 0, so a student that cannot yet draw never learns to; set reward.start_step "
            "to where it can, or use factor",
            "reward.use",
            "reward.start_step",
        )
    stochastic = student.sampler == "renoise" or (student.sampler == "cps" and student.eta > 0)
    if reward.policy_weight and (not compared or not stochastic or student.steps == 1):
        _refuse(
            "PPO needs advantages and a stochastic step: reward.terms, student.sampler=renoise or cps, two steps or more",
            "reward.policy_weight",
            "student.sampler",
        )
    if reward.policy_reuse and not reward.policy_weight:
        _refuse("further updates are PPO's; set reward.policy_weight", "reward.policy_reuse", "reward.policy_weight")
    if reward.gradient_weight and not reward.terms:
        _refuse("there is no reward to take a gradient of; give reward.terms", "reward.gradient_weight")
    if bool(config.gan.weight) != (config.gan.real is not None):
        _refuse("real images and their weight go together: set gan.weight=0.005 and gan.real=FOLDER, or neither", "gan")
    if len({term.name for term in reward.terms}) < len(reward.terms):
        _refuse("a reward is named twice", "reward.terms")
    if match.low >= match.high:
        _refuse("low must lie below high", "match.low", "match.high")
    if student.times is not None and len(student.times) != student.steps:
        _refuse(f"{len(student.times)} times for {student.steps} steps", "student.times", "student.steps")
    if student.sampler == "cps" and config.validation.every is not None:
        _refuse("diffusers has no CPS scheduler to draw validation images with; leave it out", "validation.every")
    if student.times is not None and config.validation.every is not None:
        _refuse(
            "validation draws on the model's own grid; leave student.times or validation.every out", "validation.every"
        )
    if config.validation.every is not None and config.validation.prompts is None:
        _refuse("validation draws images of prompts, and none are given", "validation.prompts", "validation.every")
    for name, section in (("optimizer", config.optimizer), ("fake.optimizer", config.fake.optimizer)):
        if section.warmup_steps >= config.train.steps:
            _refuse(f"the warm-up does not end within train.steps={config.train.steps}", f"{name}.warmup_steps")
    if config.tune.kind == "full" and (config.tune.init is not None or config.tune.targets is not None):
        _refuse("init and targets belong to a LoRA; leave them out with tune.kind=full", "tune.kind")
    _check_model(config.model, config.device, autocast=config.train.mixed_precision != "no")


def check_reward_gradient(config: RewardGradientConfig) -> None:
    images, micro, steps = config.train.images_per_step, config.train.micro_batch, config.sampler.steps
    if images % micro:
        _refuse(
            f"{micro} does not divide train.images_per_step={images}, and every forward pass takes the same number of "
            "images; use one that does",
            "train.micro_batch",
            "train.images_per_step",
        )
    method = config.method
    if method.name == "refl" and method.between is not None:
        low, high = method.between
        if not 0 <= low <= high < steps:
            _refuse(
                f"steps are counted from 0, so with sampler.steps={steps} two rising numbers of 0 to {steps - 1} are needed, "
                f"not [{low}, {high}]",
                "method.between",
                "sampler.steps",
            )
    if method.name == "draft" and method.last is not None and method.last > steps:
        _refuse(f"the sampler has {steps} steps; use so many, or null for all", "method.last", "sampler.steps")
    if method.name == "alignprop" and method.last is not None:
        fewest, most = method.last
        if not 1 <= fewest <= most <= steps:
            _refuse(
                f"two rising numbers of 1 to sampler.steps={steps} are needed, not [{fewest}, {most}]",
                "method.last",
                "sampler.steps",
            )
    if len({term.name for term in config.rewards}) < len(config.rewards):
        _refuse("a reward is named twice", "rewards")
    for term in config.rewards:
        if (term.form == "relu") != (term.threshold is not None):
            _refuse(
                f"{term.name}: form=relu and a threshold go together; give both, or form=linear with neither", "rewards"
            )
    if config.validation.every is not None and config.validation.prompts is None:
        _refuse("validation draws images of prompts, and none are given", "validation.prompts", "validation.every")
    if config.optimizer.warmup_steps >= config.train.steps:
        _refuse(f"the warm-up does not end within train.steps={config.train.steps}", "optimizer.warmup_steps")
    if not all(0 <= beta < 1 for beta in config.optimizer.betas):
        _refuse("both betas must lie in [0, 1)", "optimizer.betas")
    if config.tune.kind == "full" and (config.tune.init is not None or config.tune.targets is not None):
        _refuse("init and targets belong to a LoRA; leave them out with tune.kind=full", "tune.kind")
    if config.tune.kind == "full" and config.model.dtype == "float16":
        _refuse(
            "full fine-tuning updates the weights themselves, and float16 loses the updates; use float32, with "
            "train.mixed_precision for speed",
            "model.dtype",
            "tune.kind",
        )
    _check_model(config.model, config.device, autocast=config.train.mixed_precision != "no")
