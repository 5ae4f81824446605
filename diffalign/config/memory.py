"""Combinations of the keys that save memory or time which cannot work, each with the keys to blame and the way out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffalign.config.checks import refuse

if TYPE_CHECKING:
    from diffalign.config.distill import DistillConfig
    from diffalign.config.reward_gradient import RewardGradientConfig
    from diffalign.config.schema import OptimizerSection, TrainConfig


def check_memory(config: TrainConfig) -> None:
    """Of `diffalign train`."""
    _check_quantize(config)
    check_offload(config.optimizer)
    if config.train.shard != "none":
        _check_shard(config)
    if config.model.compile and config.model.quantize != "none":
        refuse("quantised layers are not compiled; leave one of them out", "model.compile", "model.quantize")


def check_memory_elsewhere(config: DistillConfig | RewardGradientConfig) -> None:
    """Of the loops that train in other ways."""
    _check_quantize(config)
    check_offload(config.optimizer)
    if config.model.compile:
        refuse("compile serves `diffalign train`; leave it out here", "model.compile")


def check_memory_distillation(config: DistillConfig) -> None:
    """Of `diffalign distill`, which has a second optimiser."""
    check_memory_elsewhere(config)
    check_offload(config.fake.optimizer, "fake.optimizer")


def _check_quantize(config: TrainConfig | DistillConfig | RewardGradientConfig) -> None:
    if config.tune.kind == "full" and config.model.quantize != "none":
        refuse(
            "quantised weights cannot train; set model.quantize=none, or tune.kind=lora",
            "model.quantize",
            "tune.kind",
        )


def check_offload(optimizer: OptimizerSection, key: str = "optimizer") -> None:
    """Of every verb that has an optimiser."""
    if optimizer.offload and optimizer.name != "adamw":
        refuse(
            f"offload serves adamw, whose averages are large, not {optimizer.name}; leave it out",
            f"{key}.offload",
            f"{key}.name",
        )


def _check_shard(config: TrainConfig) -> None:
    if config.tune.kind != "full":
        refuse(
            "a LoRA leaves little to cut over processes; use shard=none, or tune.kind=full", "train.shard", "tune.kind"
        )
    if config.optimizer.name != "adamw" or config.optimizer.offload:
        refuse("shard=fsdp2 takes optimizer.name=adamw without offload", "train.shard", "optimizer.name")
    if config.validation.every is not None:
        refuse(
            "one process draws the images of a validation, and none has all weights with shard=fsdp2; set "
            "validation.every=null and evaluate afterwards",
            "train.shard",
            "validation.every",
        )
    if config.train.mixed_precision == "fp16":
        refuse("shard=fsdp2 has no loss scaling; use bf16", "train.shard", "train.mixed_precision")
    if config.reference.store is not None:
        # One process may have a micro-batch that another lacks, and a forward pass needs all of them.
        refuse(
            "processes that hold a part of the reference each must compute it together; set reference.store=null",
            "train.shard",
            "reference.store",
        )
    if config.train.images_per_pass is not None:
        refuse(
            "passes predict again while gradients flow, which shard=fsdp2 was not shown to bear; use train.micro_batch=1 "
            "and model.gradient_checkpointing=true",
            "train.shard",
            "train.images_per_pass",
        )
    if config.model.compile:
        refuse("compile with shard=fsdp2 was not shown to work; leave one of them out", "train.shard", "model.compile")
