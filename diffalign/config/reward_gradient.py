"""The config of `diffalign reward-gradient`: ReFL, DRaFT and AlignProp."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from diffalign.config.images import SchedulerSection
from diffalign.config.run import PRECISION, PROMPT_COUNT, AveragedStepSection, BackboneRunConfig, RewardSection
from diffalign.config.section import (
    MOST_IMAGES,
    MOST_PIXELS,
    MOST_PROMPTS,
    NAMED,
    ROUNDING,
    UNAFFECTED,
    Section,
    Sizes,
    by_name,
    refuse,
    refuse_twice,
)

DETACH_INPUT = (
    "true: what the network sees carries no gradient from earlier steps (DRTune); the latents themselves still do"
)


class SamplerSection(Section):
    """How images are drawn, in training as in validation: by a deterministic sampler of one prediction a step."""

    steps: int = Field(40, gt=0, le=1000, description="denoising steps")
    scheduler: SchedulerSection | None = Field(
        None, description="null: the model's own; where that is refused: ddim, euler or flow_euler"
    )
    guidance_scale: float = Field(
        1.0, ge=0, description="classifier-free guidance, also in the steps with a gradient; 1 or less: none"
    )
    checkpointing: Annotated[bool, UNAFFECTED] = Field(
        True,
        description="true: a step with a gradient keeps its input alone and is computed again in the backward pass; same "
        "gradients",
    )


class ReFLSection(Section):
    """ReFL: one late prediction, whose x0 is judged before the sampler has ended."""

    text_key: ClassVar[str | None] = "name"

    name: Literal["refl"] = Field("refl", description="the step that is judged is drawn again in every training step")
    between: Sizes | None = Field(
        None,
        description="[first, last] of the sampler's steps it is drawn from, counted from 0; null: the last quarter",
    )
    depth: int = Field(1, gt=0, description="steps with a gradient up to and with it, or as many as there are")
    detach_input: bool = Field(False, description=DETACH_INPUT)


class DRaFTSection(Section):
    """DRaFT-K: a gradient through the last K steps of the sampler."""

    text_key: ClassVar[str | None] = "name"

    name: Literal["draft"] = Field("draft", description="DRaFT-K; the finished image is judged")
    last: int | None = Field(1, gt=0, description="K, steps with a gradient; null: all of them (DRaFT)")
    detach_input: bool = Field(False, description=DETACH_INPUT)


class AlignPropSection(Section):
    """AlignProp: as DRaFT-K, with K drawn again in every training step."""

    text_key: ClassVar[str | None] = "name"

    name: Literal["alignprop"] = Field("alignprop", description="randomised truncation; the finished image is judged")
    last: Sizes | None = Field(None, description="[fewest, most] steps with a gradient; null: from 1 to all")
    detach_input: bool = Field(False, description=DETACH_INPUT)


class DRaFTLVSection(Section):
    """DRaFT-LV: DRaFT-1 with less variance, the last step being taken from several noises."""

    text_key: ClassVar[str | None] = "name"

    name: Literal["draft_lv"] = Field("draft_lv", description="a mean over noises in the last step")
    noises: int = Field(
        2, gt=0, le=MOST_IMAGES, description="times that a finished image is noised again to the last step's level"
    )


Method = Annotated[
    ReFLSection | DRaFTSection | AlignPropSection | DRaFTLVSection,
    Field(discriminator="name"),
    BeforeValidator(by_name),
]


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

    @model_validator(mode="after")
    def _check_form(self) -> GradientRewardSection:
        if (self.form == "relu") != (self.threshold is not None):
            refuse(
                f"{self.name}: form=relu and a threshold go together; give both, or form=linear with neither",
                "form",
                "threshold",
            )
        return self


class DriftSection(Section):
    """What holds the policy at the reference: the squared difference of their predictions, at the latents visited."""

    weight: float = Field(
        0.0, ge=0, description="lambda, in units of the loss for a mean squared difference of 1; 0: none"
    )
    measure: Annotated[bool, UNAFFECTED] = Field(
        True,
        description="true: drift is logged where weight is 0 too, for a pass of the reference more in steps with a gradient",
    )


class DecoderSection(Section):
    """How latents are decoded with a gradient: in float32, one micro-batch at once."""

    checkpointing: Annotated[bool, UNAFFECTED] = Field(
        True, description="true: block by block again in the backward pass: less memory"
    )
    tiling: bool = Field(
        False, description="true: tile by tile where images are larger than a tile, which changes them slightly"
    )


class GradientTrainSection(AveragedStepSection):
    """Length and shape of the training."""

    drawn: ClassVar[str] = "images_per_step"
    member: ClassVar[str] = "images"

    images_per_step: int = Field(
        8,
        gt=0,
        le=MOST_IMAGES,
        description="images of one update, each of its own prompt, over all processes and micro-batches",
    )
    mixed_precision: Annotated[Literal["auto", "no", "bf16"], NAMED] = Field("auto", description=PRECISION)
    cache_prompts: Annotated[bool, ROUNDING] = Field(
        True, description="true: encode all prompts first and free the text encoders; false: as they come up"
    )


class RewardGradientConfig(BackboneRunConfig):
    """Train a model on the gradient of differentiable rewards."""

    kind: Literal["reward-gradient"] = Field("reward-gradient", description="which verb reads this file")
    prompts: Annotated[str, NAMED] = Field(
        min_length=1, description="what is trained on: a .txt or .jsonl file, testbed:train, or suite:NAME:PATH"
    )
    n: int | None = Field(None, gt=0, le=MOST_PROMPTS, description=PROMPT_COUNT)
    resolution: int | None = Field(
        None, gt=0, le=MOST_PIXELS, multiple_of=8, description="side of the images, pixels; null: the model's"
    )
    sampler: SamplerSection = SamplerSection()
    method: Method = ReFLSection()
    rewards: list[GradientRewardSection] = Field(min_length=1, description="what is followed")
    drift: DriftSection = DriftSection()
    decoder: DecoderSection = DecoderSection()
    train: GradientTrainSection = GradientTrainSection()

    @model_validator(mode="after")
    def _check_steps(self) -> RewardGradientConfig:
        method, steps = self.method, self.sampler.steps
        if method.name == "refl" and method.between is not None:
            low, high = method.between
            if not 0 <= low <= high < steps:
                refuse(
                    f"steps are counted from 0, so with sampler.steps={steps} two rising numbers of 0 to {steps - 1} are "
                    f"needed, not [{low}, {high}]",
                    "method.between",
                    "sampler.steps",
                )
        if method.name == "draft" and method.last is not None and method.last > steps:
            refuse(f"the sampler has {steps} steps; use at most that, or null for all", "method.last", "sampler.steps")
        if method.name == "alignprop" and method.last is not None:
            fewest, most = method.last
            if not 1 <= fewest <= most <= steps:
                refuse(
                    f"two rising numbers of 1 to sampler.steps={steps} are needed, not [{fewest}, {most}]",
                    "method.last",
                    "sampler.steps",
                )
        return self

    @model_validator(mode="after")
    def _check_rewards(self) -> RewardGradientConfig:
        refuse_twice([term.written_name for term in self.rewards], "a reward", "rewards")
        return self
