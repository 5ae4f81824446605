"""The config of `diffalign distill`: a few-step student of the model itself."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from diffalign.config.noise import TimeSection
from diffalign.config.run import (
    PRECISION,
    PROMPT_COUNT,
    STEPS,
    AveragedStepSection,
    BackboneRunConfig,
    OptimizerSection,
    RewardSection,
    check_warmup,
)
from diffalign.config.section import (
    MOST_IMAGES,
    MOST_PIXELS,
    MOST_PROMPTS,
    NAMED,
    ROUNDING,
    UNAFFECTED,
    Section,
    refuse,
    refuse_twice,
)


class StudentSection(Section):
    """How the student samples, in training as afterwards."""

    steps: int = Field(4, gt=0, le=64, description="denoising steps of the student")
    sampler: Literal["renoise", "euler", "cps"] = Field(
        "renoise",
        description="renoise: x0 noised again with fresh noise (DMD2); euler: deterministic; cps: between the two, by eta",
    )
    eta: float = Field(0.9, ge=0, le=1, description="share of fresh noise (cps only); 0 is euler, 1 renoise")
    times: list[float] | None = Field(
        None,
        min_length=1,
        description="the student's times, falling: timesteps, or noise levels of a flow, which are not shifted again; null: "
        "the even grid with the model's shift",
    )

    @property
    def stochastic(self) -> bool:
        """Whether a step draws fresh noise."""
        return self.sampler == "renoise" or (self.sampler == "cps" and self.eta > 0)

    @model_validator(mode="after")
    def _check_times(self) -> StudentSection:
        if self.times is not None and len(self.times) != self.steps:
            refuse(f"{len(self.times)} times for {self.steps} steps", "times", "steps")
        return self


class MatchSection(Section):
    """Where teacher and fake network are compared."""

    guidance: float = Field(7.0, ge=0, description="guidance scale of the teacher, u + w (c - u); 1: none")
    low: float = Field(0.02, ge=0, lt=1, description="least noisy level, as a share of the time axis before the shift")
    high: float = Field(0.98, gt=0, le=1, description="noisiest level, likewise")
    shift: float | None = Field(
        None, gt=0, description="moves the levels towards noise; null: as the model's own schedule; 1: not at all"
    )
    decoupled: bool = Field(
        False,
        description="true: the guidance's part at a level of its own, below the student's (Decoupled DMD); costs a teacher "
        "pass more",
    )

    @model_validator(mode="after")
    def _check_levels(self) -> MatchSection:
        if self.low >= self.high:
            refuse("low must lie below high", "low", "high")
        return self


class GroupSection(Section):
    """What is averaged over a group: GNDM. Size 1 is DMD2."""

    axis: Literal["none", "prompt", "renoise"] = Field(
        "prompt", description="images of one prompt, re-noisings of one image, or no groups"
    )
    size: int = Field(4, gt=0, le=MOST_IMAGES, description="members of a group")
    scale: Literal["per_sample", "group_mean", "none"] = Field(
        "group_mean",
        description="what a direction is divided by: its own size (DMD2), the mean size of the group, nothing",
    )
    advantage: Literal["none", "scalar_rdm"] = Field(
        "none", description="scalar_rdm: the log ratio of teacher and student, as a number, joins the advantages"
    )
    advantage_weight: float = Field(1.0, ge=0, description="its weight among the rewards (scalar_rdm only)")

    @model_validator(mode="after")
    def _check_axis(self) -> GroupSection:
        if self.axis == "none" and self.size != 1:
            refuse("without an axis there are no groups; set group.size=1, or group.axis=prompt", "size", "axis")
        return self


class RewardTerm(RewardSection):
    """A reward of the mix."""

    column: str | None = Field(None, description="which column of the reward; null: its first")
    weight: float = Field(1.0, gt=0, description="its weight among the rewards")


class RewardMixSection(Section):
    """Rewards of the student's finished images: GNDMR. Without terms nothing is decoded."""

    terms: list[RewardTerm] = Field(default_factory=list, description="the rewards; none: pure distillation")
    use: Literal["factor", "raw", "exponential"] = Field(
        "factor",
        description="factor: the guidance's part times max(0, 1 + strength A); raw: times A; exponential: all of the direction "
        "times exp(r / |r|), of one reward",
    )
    strength: float = Field(0.5, ge=0, description="lambda (factor only)")
    start_step: int = Field(
        0, ge=0, description="steps without any advantage before; raw needs a student that works already"
    )
    baseline: Literal["mean", "leave_one_out"] = Field(
        "mean", description="what a reward is compared with: the prompt's mean, or the mean of the others"
    )
    weights: Literal["fixed", "by_spread"] = Field(
        "fixed", description="by_spread: each prompt weighs its rewards by their spread there (DVAO)"
    )
    clip: float = Field(5.0, gt=0, description="advantages are cut to this size")
    policy_weight: float = Field(
        0.0, ge=0, description="weight of PPO's loss of the step that learns (renoise and cps only); 0: none"
    )
    policy_clip: float = Field(
        1e-5, gt=0, description="PPO's clip; log-probabilities are means over elements, so that ratios stay near 1"
    )
    policy_reuse: int = Field(
        0, ge=0, le=MOST_IMAGES, description="further updates of the student by PPO on the same roll-outs"
    )
    gradient_weight: float = Field(
        0.0, ge=0, description="weight of the gradient of differentiable rewards, in the last step; 0: none"
    )
    gradient_balance: bool = Field(
        False, description="true: that gradient is first made as large, image by image, as the distillation's"
    )

    @model_validator(mode="after")
    def _check_use(self) -> RewardMixSection:
        refuse_twice([term.written_name for term in self.terms], "a reward", "terms")
        if self.use == "raw" and self.start_step == 0:
            refuse(
                "raw leaves no guidance where A is 0, so a student that cannot yet draw never learns to; set "
                "reward.start_step to where it can, or use factor",
                "use",
                "start_step",
            )
        if self.policy_reuse and not self.policy_weight:
            refuse("further updates are PPO's; set reward.policy_weight", "policy_reuse", "policy_weight")
        if self.gradient_weight and not self.terms:
            refuse("there is no reward to take a gradient of; give reward.terms", "gradient_weight")
        return self


class FakeSection(Section):
    """The network that learns what the student's images look like."""

    updates: int = Field(
        5, gt=0, le=MOST_IMAGES, description="its updates per update of the student, each on fresh images but the first"
    )
    times: TimeSection = Field(TimeSection(), description="noise levels of its training")
    optimizer: OptimizerSection = Field(OptimizerSection(), description="its own optimiser")


class GanSection(Section):
    """Real images beside the teacher: a head on the fake network's middle tells them from the student's (DMD2)."""

    weight: float = Field(0.0, ge=0, description="weight of the adversarial loss for the student; 0: none of all this")
    critic_weight: float = Field(0.01, gt=0, description="weight of the head's loss beside the fake network's")
    hidden: int = Field(256, gt=0, le=MOST_PIXELS, description="width of the head")
    real: Annotated[str | None, NAMED] = Field(
        None, description="a dataset folder, whose first image of every group is real, or testbed: rendered scenes"
    )
    n: int | None = Field(
        None,
        gt=0,
        le=MOST_PROMPTS,
        description="use only n real images; null: all of a folder, as many scenes as prompts",
    )

    @model_validator(mode="after")
    def _check_real(self) -> GanSection:
        if bool(self.weight) != (self.real is not None):
            refuse(
                "real images and their weight go together: set gan.weight=0.005 and gan.real=FOLDER, or neither",
                "weight",
                "real",
            )
        return self


class DistillTrainSection(AveragedStepSection):
    """Length and shape of the training."""

    steps: Annotated[int, STEPS] = Field(
        1000, gt=0, description="updates of the student; DMD2 counts those of the fake network"
    )
    groups_per_step: int = Field(
        8,
        gt=0,
        le=MOST_IMAGES,
        description="prompts of one update, over all processes and micro-batches, each with its group",
    )
    mixed_precision: Annotated[Literal["auto", "no", "bf16"], NAMED] = Field("auto", description=PRECISION)
    max_grad_norm: float = Field(10.0, gt=0, description="both gradients are scaled down to this norm")
    cache_prompts: Annotated[bool, ROUNDING] = Field(
        True, description="true: encode all prompts first and free the text encoders; false: as they come up"
    )


class DistillConfig(BackboneRunConfig):
    """Distil a model into a student with few steps, with or without rewards."""

    kind: Literal["distill"] = Field("distill", description="which verb reads this file")
    prompts: Annotated[str, NAMED] = Field(
        min_length=1, description="what is trained on: a .txt or .jsonl file, testbed:train, or suite:NAME:PATH"
    )
    n: int | None = Field(None, gt=0, le=MOST_PROMPTS, description=PROMPT_COUNT)
    resolution: int | None = Field(
        None, gt=0, le=MOST_PIXELS, multiple_of=8, description="side of the images, pixels; null: the model's"
    )
    student: StudentSection = StudentSection()
    match: MatchSection = MatchSection()
    group: GroupSection = GroupSection()
    reward: RewardMixSection = RewardMixSection()
    fake: FakeSection = FakeSection()
    gan: GanSection = GanSection()
    train: DistillTrainSection = DistillTrainSection()
    save_pipeline: Annotated[bool, UNAFFECTED] = Field(
        True, description="true: also the whole student as a diffusers pipeline, student/; false: weights/ alone"
    )

    @property
    def compared(self) -> bool:
        """Whether the images of a group get advantages."""
        return bool(self.reward.terms) or self.group.advantage != "none"

    @model_validator(mode="after")
    def _check_advantages(self) -> DistillConfig:
        group, reward = self.group, self.reward
        if self.compared and (group.axis != "prompt" or group.size < 2):
            refuse(
                "advantages compare the images of one prompt; set group.axis=prompt and group.size=2 or more",
                "group.size",
                "group.axis",
            )
        if self.compared and reward.use != "exponential" and self.match.guidance == 1.0:
            refuse("advantages multiply the guidance's part, and match.guidance=1 leaves none", "match.guidance")
        if reward.use == "exponential" and (len(reward.terms) != 1 or group.advantage != "none"):
            refuse("exponential takes exactly one reward and no other advantage", "reward.use", "reward.terms")
        if reward.policy_weight and (not self.compared or not self.student.stochastic or self.student.steps == 1):
            refuse(
                "PPO needs advantages and a stochastic step: reward.terms, student.sampler=renoise or cps, two steps or "
                "more",
                "reward.policy_weight",
                "student.sampler",
            )
        return self

    @model_validator(mode="after")
    def _check_validation(self) -> DistillConfig:
        if self.validation.every is None:
            return self
        if self.student.sampler == "cps":
            refuse("diffusers has no CPS scheduler to draw validation images with; leave it out", "validation.every")
        if self.student.times is not None:
            refuse(
                "validation draws on the model's own grid; leave student.times or validation.every out",
                "validation.every",
            )
        return self

    @model_validator(mode="after")
    def _check_fake(self) -> DistillConfig:
        check_warmup(self.fake.optimizer, self.train.steps, "fake.optimizer")
        return self
