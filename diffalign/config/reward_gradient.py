"""The config of `diffalign reward-gradient`: ReFL, DRaFT and AlignProp. Sections as in `config_schema.py`.

Checks of one value stand on its field; checks of values against each other in `config_checks.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from diffalign.config.checks_reward_gradient import check_reward_gradient
from diffalign.config.distill import StudentValidationSection
from diffalign.config.memory import check_memory_elsewhere
from diffalign.config.schema import (
    DEVICE,
    CheckpointSection,
    Device,
    ModelSection,
    OptimizerSection,
    RewardSection,
    TrackingSection,
    TuneSection,
)
from diffalign.config.section import FilePath, Section, Sizes

DETACH_INPUT = (
    "true: what the network sees carries no gradient from earlier steps (DRTune); the latents themselves still do"
)


class SamplerSection(Section):
    """How images are drawn, in training as in validation: by the model's own deterministic sampler."""

    steps: int = Field(40, gt=0, le=1000, description="denoising steps")
    guidance_scale: float = Field(
        1.0, ge=0, description="classifier-free guidance, also in the steps with a gradient; 1 or less: none"
    )
    checkpointing: bool = Field(
        True,
        description="true: a step with a gradient keeps its input alone and is computed again in the backward pass; same "
        "gradients",
    )


class ReFLSection(Section):
    """ReFL: one late prediction, whose x0 is judged before the sampler has ended."""

    name: Literal["refl"] = Field("refl", description="the step that is judged is drawn anew in every training step")
    between: Sizes | None = Field(
        None,
        description="[first, last] of the sampler's steps it is drawn from, counted from 0; null: the last quarter",
    )
    depth: int = Field(1, gt=0, description="steps with a gradient up to and with it, or as many as there are")
    detach_input: bool = Field(False, description=DETACH_INPUT)


class DRaFTSection(Section):
    """DRaFT-K: a gradient through the last K steps of the sampler."""

    name: Literal["draft"] = Field("draft", description="DRaFT-K; the finished image is judged")
    last: int | None = Field(1, gt=0, description="K, steps with a gradient; null: all of them (DRaFT)")
    detach_input: bool = Field(False, description=DETACH_INPUT)


class AlignPropSection(Section):
    """AlignProp: as DRaFT-K, with K drawn anew in every training step."""

    name: Literal["alignprop"] = Field("alignprop", description="randomised truncation; the finished image is judged")
    last: Sizes | None = Field(None, description="[fewest, most] steps with a gradient; null: from 1 to all")
    detach_input: bool = Field(False, description=DETACH_INPUT)


class DRaFTLVSection(Section):
    """DRaFT-LV: DRaFT-1 with less variance, the last step being taken from several noises."""

    name: Literal["draft_lv"] = Field("draft_lv", description="a mean over noises in the last step")
    noises: int = Field(2, gt=0, description="times that a finished image is noised again to the last step's level")


Method = Annotated[ReFLSection | DRaFTSection | AlignPropSection | DRaFTLVSection, Field(discriminator="name")]


class GradientRewardSection(RewardSection):
    """A reward that is followed."""

    name: str = Field(
        min_length=1, description="the reward's name; it must be differentiable (`diffalign rewards` says which are)"
    )
    detector: str | None = Field(None, description="of no use here, since no reward with a detector is differentiable")
    weight: float = Field(1.0, gt=0, description="its weight in the loss; it also brings rewards to one scale")
    form: Literal["linear", "relu"] = Field(
        "linear", description="linear: -score; relu: max(0, threshold - score), which lets go of what is good enough"
    )
    threshold: float | None = Field(None, description="of relu, in the score's unit; null with linear")


class DriftSection(Section):
    """What holds the policy at the reference: the squared difference of their predictions, at the latents visited."""

    weight: float = Field(
        0.0, ge=0, description="lambda, in units of the loss for a mean squared difference of 1; 0: none"
    )
    measure: bool = Field(
        True,
        description="true: drift is logged where weight is 0 too, for a pass of the reference more in steps with a gradient",
    )


class DecoderSection(Section):
    """How latents are decoded with a gradient: in float32, one micro-batch at once."""

    checkpointing: bool = Field(True, description="true: block by block again in the backward pass: less memory")
    tiling: bool = Field(
        False, description="true: tile by tile where images are larger than a tile, which changes them slightly"
    )


class GradientTrainSection(Section):
    """Length and shape of the training."""

    steps: int = Field(400, gt=0, description="updates of the policy")
    images_per_step: int = Field(
        8, gt=0, description="images of one update, each of its own prompt, over all processes and micro-batches"
    )
    micro_batch: int = Field(8, gt=0, description="images in one forward pass; must divide images_per_step")
    mixed_precision: Literal["auto", "no", "bf16"] = Field("auto", description="auto: bf16 on CUDA, no on CPU")
    max_grad_norm: float = Field(1.0, gt=0, description="the gradient is scaled down to this norm")
    ema_decay: float | None = Field(None, gt=0, lt=1, description="moving average of the weights, as 0.999; null: none")
    threads: int | None = Field(
        None, gt=0, description="CPU threads of torch; fix it where runs must agree bit for bit"
    )
    log_every: int = Field(1, gt=0, description="a row in metrics.jsonl every so many steps")
    cache_prompts: bool = Field(
        True, description="true: all prompts are encoded first and text encoders freed; false: as they come up"
    )


class GradientValidationSection(StudentValidationSection):
    """Images of prompts that are not trained on, drawn as in training; the best weights go to best/."""

    rewards: list[RewardSection] = Field(
        [RewardSection()],
        min_length=1,
        description="what judges, better none that is trained on; the first column of the first decides what is best",
    )


class RewardGradientConfig(Section):
    """`diffalign reward-gradient`."""

    run_dir: FilePath = Field(description="everything the run writes; the same command goes on where it stopped")
    seed: int = Field(0, ge=0, description="seed of every draw")
    device: Device = Field("auto", description=DEVICE)
    model: ModelSection
    tune: TuneSection = TuneSection()
    prompts: str = Field(
        min_length=1, description="what is trained on: a .txt or .jsonl file, testbed:train, or suite:NAME:PATH"
    )
    n: int | None = Field(None, gt=0, description="only so many prompts; null: all of a file, 256 of the testbed")
    resolution: int | None = Field(
        None, gt=0, multiple_of=8, description="side of the images, pixels; null: the model's"
    )
    sampler: SamplerSection = SamplerSection()
    method: Method = ReFLSection()
    rewards: list[GradientRewardSection] = Field(min_length=1, description="what is followed")
    drift: DriftSection = DriftSection()
    decoder: DecoderSection = DecoderSection()
    train: GradientTrainSection = GradientTrainSection()
    optimizer: OptimizerSection = OptimizerSection()
    checkpoint: CheckpointSection = CheckpointSection()
    validation: GradientValidationSection = GradientValidationSection()
    on_alarm: Literal["warn", "stop"] = Field(
        "warn", description="what a health alarm does: say it and go on, or save and stop"
    )
    tracking: TrackingSection = TrackingSection()

    @model_validator(mode="before")
    @classmethod
    def _micro(cls, value: Any) -> Any:
        """A micro-batch that is not given is the largest divisor up to 8."""
        train = value.get("train") if isinstance(value, dict) else None
        images = train.get("images_per_step") if isinstance(train, dict) else None
        if isinstance(train, dict) and isinstance(images, int) and images > 0 and "micro_batch" not in train:
            micro = next(n for n in range(min(8, images), 0, -1) if images % n == 0)
            return {**value, "train": {**train, "micro_batch": micro}}
        return value

    @model_validator(mode="after")
    def _consistent(self) -> RewardGradientConfig:
        check_reward_gradient(self)
        check_memory_elsewhere(self)
        return self
