"""Combinations of values that cannot work, each with the keys to blame and the way out.

An error here is a pydantic error of type `combination`; its context lists the keys, for naming the line.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NoReturn

from pydantic_core import PydanticCustomError

from diffalign.config.objective import OBJECTIVE_SECTIONS

if TYPE_CHECKING:
    from diffalign.config.data import CombineSection
    from diffalign.config.schema import EvalConfig, ModelSection, SampleConfig, TrainConfig
    from diffalign.config.synth import RankSection, SynthConfig

COMBINATION = "combination"
STATISTICS = {"minmax": {"min", "max"}, "zscore": {"mean", "std"}}


def refuse(message: str, *keys: str) -> NoReturn:
    """`keys`, dotted, the likeliest culprit first."""
    raise PydanticCustomError(COMBINATION, "{message}", {"message": message, "keys": keys})


def check_training(config: TrainConfig) -> None:
    _check_batches(config)
    _check_weights(config)
    _check_labels(config)
    _check_selection(config)
    _check_inversion(config)
    _check_reference(config)
    check_model(config.model, config.device, autocast=config.train.mixed_precision != "no")
    times = config.times
    if times.sampler == "uniform" and (times.mean, times.std) != (0.0, 1.0):
        refuse(
            "mean and std shape logit_normal times only; set times.sampler=logit_normal or leave them out",
            "times.mean",
            "times.std",
        )
    if config.optimizer.warmup_steps >= config.train.steps:
        refuse(
            f"the warm-up of {config.optimizer.warmup_steps} steps does not end within "
            f"train.steps={config.train.steps}; shorten it",
            "optimizer.warmup_steps",
            "train.steps",
        )
    if not all(0 <= beta < 1 for beta in config.optimizer.betas):
        refuse("both betas must lie in [0, 1)", "optimizer.betas")
    if config.validation.every is not None and config.validation.prompts is None:
        refuse(
            "validation draws images of prompts, and none are given; set validation.prompts to a file, or "
            "validation.every=null",
            "validation.prompts",
            "validation.every",
        )
    if config.train.auto_beta is not None and not config.objective.kind.single_margin:
        able = " and ".join(name for name, section in OBJECTIVE_SECTIONS.items() if section.kind.single_margin)
        refuse(
            f"auto_beta needs a beta and one margin a group that is proportional to it, as {able} have, not "
            f"{config.objective.name}; leave it out",
            "train.auto_beta",
            "objective.name",
        )
    if len(set(config.tracking.trackers)) < len(config.tracking.trackers):
        refuse("a tracker is named twice", "tracking.trackers")


def _check_batches(config: TrainConfig) -> None:
    groups, micro = config.train.groups_per_step, config.train.micro_batch
    if groups % micro:
        fitting = ", ".join(str(n) for n in range(min(groups, micro), 0, -1) if groups % n == 0)
        refuse(
            f"{micro} does not divide train.groups_per_step={groups}, and every forward pass takes the same number of "
            f"whole groups; use {fitting}",
            "train.micro_batch",
            "train.groups_per_step",
        )


def _check_weights(config: TrainConfig) -> None:
    if config.tune.reference == "base" and config.tune.init is None:
        refuse(
            "without tune.init the reference is the base anyway; give tune.init or leave reference out",
            "tune.reference",
            "tune.init",
        )
    if config.tune.kind == "full":
        if config.tune.init is not None:
            refuse(
                "init loads a LoRA, but tune.kind=full trains no LoRA; set tune.kind=lora or leave init out",
                "tune.init",
                "tune.kind",
            )
        if config.tune.targets is not None:
            refuse(
                "targets choose where a LoRA goes, but tune.kind=full trains all weights; leave targets out",
                "tune.targets",
            )
        if config.model.dtype == "float16":
            refuse(
                "full fine-tuning updates the weights themselves, and float16 loses the updates; use float32, with "
                "train.mixed_precision for speed",
                "model.dtype",
                "tune.kind",
            )
    if config.device == "cpu" and config.train.mixed_precision == "fp16":
        refuse("fp16 needs a GPU; use no or bf16 with device=cpu", "train.mixed_precision", "device")


def _check_labels(config: TrainConfig) -> None:
    labels = config.labels
    if (labels.source == "combined") != (labels.combine is not None):
        refuse(
            "source=combined and combine go together: labels.source=combined "
            "'labels.combine={weights: {geneval: 1.0, pickscore: 1.0}}' says how",
            "labels.source" if labels.combine is None else "labels.combine",
        )
    if labels.source == "preference" and labels.transform != "none":
        refuse(
            f"preference holds vote shares already, transform={labels.transform} is for scores; set "
            "labels.source=scores.NAME or labels.transform=none",
            "labels.transform",
            "labels.source",
        )
    wanted = STATISTICS.get(labels.transform)
    if labels.combine is not None:
        _check_combination(labels.combine)
        if wanted is not None:
            refuse(
                f"combined labels are scaled already, transform={labels.transform} is for one reward; use none, votes or "
                "balanced",
                "labels.transform",
                "labels.combine",
            )
        wanted = {f"{name}.{part}" for name in labels.combine.weights for part in ("mean", "std")}
    if labels.stats is not None and wanted is None:
        refuse(
            f"statistics serve minmax, zscore and combined labels, not transform={labels.transform}; leave stats out",
            "labels.stats",
            "labels.transform",
        )
    unscaled = labels.source != "preference" and labels.transform in ("none", "zscore")
    if unscaled and config.objective.build().unit_labels:
        refuse(
            f"{config.objective.name} compares scores between 0 and 1, and others would count as certain or as nothing; set "
            "labels.transform=minmax, or the objective's own bounds to the reward's",
            "labels.transform",
            "labels.source",
        )
    if labels.stats is not None and wanted is not None and set(labels.stats) != wanted:
        what = labels.transform if labels.combine is None else "source=combined"
        refuse(f"{what} takes exactly {' and '.join(sorted(wanted))}", "labels.stats")


def _check_combination(combine: CombineSection) -> None:
    if any(weight < 0 for weight in combine.weights.values()) or not any(combine.weights.values()):
        refuse(
            "a weight below 0 would vote against its own reward, and one at least must be above 0",
            "labels.combine.weights",
        )
    if (combine.how == "gated") != bool(combine.gates):
        refuse(
            "how=gated and gates go together, as gates={geneval.exact: 1.0}",
            "labels.combine.gates",
            "labels.combine.how",
        )


def _check_selection(config: TrainConfig) -> None:
    selection, labels = config.selection, config.labels
    by_phase = selection.groups == "curriculum" or selection.images in ("rank_gap", "score_gap")
    if selection.phases != 3 and not by_phase:
        refuse(
            "nothing goes by phases; set selection.groups=curriculum or selection.images=rank_gap, or leave it out",
            "selection.phases",
            "selection.groups",
        )
    if (selection.images == "variance") != (selection.sizes is not None):
        refuse(
            "images=variance and sizes go together: selection.sizes=[4, 8] says how many images",
            "selection.sizes",
            "selection.images",
        )
    if selection.sizes is not None and min(selection.sizes) < 2:
        refuse("a preference needs at least two images", "selection.sizes")
    if selection.images != "all" and config.data.group_size is not None:
        refuse(
            f"selection.images={selection.images} chooses the images of a step, and data.group_size draws them; leave one "
            "out",
            "selection.images",
            "data.group_size",
        )
    centred = labels.transform in ("votes", "balanced") or (labels.combine is not None and labels.combine.how == "dvao")
    if selection.weight == "mean" and (labels.source == "preference" or centred):
        refuse(
            "vote shares, dvao and balanced labels have the same mean in every group, so none would count more; set "
            "labels.source=scores.NAME, or selection.weight=gap",
            "selection.weight",
            "labels.source",
        )


def _check_inversion(config: TrainConfig) -> None:
    inversion = config.inversion
    changed = [key for key, value in type(inversion)().model_dump().items() if inversion.model_dump()[key] != value]
    if changed and config.noise != "inverted":
        refuse(
            f"inversion has no effect with noise={config.noise}; set noise=inverted or leave it out",
            *(f"inversion.{key}" for key in changed),
            "noise",
        )
    if inversion.average_from > inversion.iterations:
        refuse(
            f"a step has {inversion.iterations + 1} predictions, numbered from 0: none is left to average; use at most "
            f"inversion.iterations={inversion.iterations}",
            "inversion.average_from",
            "inversion.iterations",
        )


def _check_reference(config: TrainConfig) -> None:
    reference = config.reference
    if reference.store is None:
        if reference.keep != "errors":
            refuse("keep says what goes into a store, and there is none; set reference.store", "reference.keep")
        return
    if config.noise == "inverted" and config.inversion.by == "policy":
        refuse(
            "the noise is found by the policy, which is another one at every step, so nothing can be kept; set "
            "inversion.by=reference, or reference.store=null",
            "reference.store",
            "inversion.by",
        )
    if config.objective.kind.needs_gap and reference.keep == "errors":
        refuse(
            f"{config.objective.name} looks at the reference's predictions, not at its errors alone; set "
            "reference.keep=predictions",
            "reference.keep",
            "objective.name",
        )
    if not config.objective.kind.needs_reference and config.noise != "inverted":
        refuse(
            f"{config.objective.name} has no reference, and nothing would be kept; leave reference.store out",
            "reference.store",
            "objective.name",
        )


def check_model(model: ModelSection, device: str, autocast: bool = False) -> None:
    if device == "cpu" and model.attention != "sdpa":
        refuse(f"{model.attention} needs a GPU; use sdpa with device=cpu", "model.attention", "device")
    if model.attention == "flash" and model.dtype == "float32" and not autocast:
        refuse(
            "flash attention has no float32 kernel; use model.dtype=bfloat16, or sdpa", "model.attention", "model.dtype"
        )


def _check_size(height: int | None, width: int | None) -> None:
    if (height is None) != (width is None):
        refuse("give both height and width, or neither", "height" if width is None else "width")


def check_sampling(config: SampleConfig) -> None:
    check_model(config.model, config.device)
    _check_size(config.height, config.width)


def check_evaluation(config: EvalConfig) -> None:
    for name in config.others:
        # Names become folders.
        if name in ("base", "tuned") or not re.fullmatch(r"[\w.+-]+", name) or set(name) == {"."}:
            refuse(f"{name!r} is taken or no plain name; use letters, digits, dots and dashes", "others")
    names = [config.reward.name, *(reward.name for reward in config.more_rewards)]
    if len(set(names)) < len(names):
        refuse("a reward is named twice", "more_rewards", "reward.name")
    check_model(config.model, config.device)
    _check_size(config.height, config.width)


def check_ranking(rank: RankSection) -> None:
    if (rank.choose == "all") != (rank.k is None):
        refuse("choose and k go together: choose=extremes, random or variance, and k=4 say", "choose", "k")
    if rank.splits is not None:
        if any(share < 0 for share in rank.splits.values()) or sum(rank.splits.values()) >= 1:
            refuse("shares must be positive and leave some prompts to train", "splits")
        if "train" in rank.splits:
            refuse("train gets what the other splits leave; name only those", "splits")
    unknown = set(rank.weights) - set(rank.sources or rank.weights)
    if unknown:
        refuse(f"{sorted(unknown)[0]} is not among sources", "weights", "sources")
    if any(weight < 0 for weight in rank.weights.values()):
        refuse("a weight below 0 would vote against its own reward", "weights")


def check_synth(config: SynthConfig) -> None:
    names = [generator.name for generator in config.generators]
    if len(set(names)) < len(names):
        refuse("two generators have the same name", "generators")
    rewards = [reward.name for reward in config.rewards]
    if len(set(rewards)) < len(rewards):
        refuse("a reward is named twice; its columns can vote separately, as rank.sources=[geneval.exact]", "rewards")
    for generator in config.generators:
        check_model(generator.model, config.device)
        _check_size(generator.height, generator.width)
