"""The config of `diffalign distill`: a student with few steps from the model itself. Sections as in `config_schema.py`.

Checks of one value stand on its field; checks of values against each other in `DistillConfig` and `config_checks.py`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from diffalign.config.checks_distill import check_distillation
from diffalign.config.memory import check_memory_distillation
from diffalign.config.schema import (
    DEVICE,
    CheckpointSection,
    Device,
    ModelSection,
    OptimizerSection,
    RewardSection,
    TimeSection,
    TrackingSection,
    TuneSection,
)
from diffalign.config.section import FilePath, Section


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


class GroupSection(Section):
    """What is averaged over a group: GNDM. Size 1 is DMD2."""

    axis: Literal["none", "prompt", "renoise"] = Field(
        "prompt", description="images of one prompt, re-noisings of one image, or no groups"
    )
    size: int = Field(4, gt=0, description="members of a group")
    scale: Literal["per_sample", "group_mean", "none"] = Field(
        "group_mean",
        description="what a direction is divided by: its own size (DMD2), the mean size of the group, nothing",
    )
    advantage: Literal["none", "scalar_rdm"] = Field(
        "none", description="scalar_rdm: the log ratio of teacher and student, as a number, joins the advantages"
    )
    advantage_weight: float = Field(1.0, ge=0, description="its weight among the rewards (scalar_rdm only)")


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
        0.0, ge=0, description="adds so many times PPO's loss of the step that learns (renoise and cps only); 0: none"
    )
    policy_clip: float = Field(
        1e-5, gt=0, description="PPO's clip; log-probabilities are means over elements, so that ratios stay near 1"
    )
    policy_reuse: int = Field(0, ge=0, description="further updates of the student by PPO on the same roll-outs")
    gradient_weight: float = Field(
        0.0, ge=0, description="adds so many times the gradient of differentiable rewards, in the last step; 0: none"
    )
    gradient_balance: bool = Field(
        False, description="true: that gradient is first made as large, image by image, as the distillation's"
    )


class FakeSection(Section):
    """The network that learns what the student's images look like."""

    updates: int = Field(
        5, gt=0, description="its updates per update of the student, each on fresh images but the first"
    )
    times: TimeSection = Field(TimeSection(), description="noise levels of its training")
    optimizer: OptimizerSection = Field(OptimizerSection(), description="its own optimiser")


class GanSection(Section):
    """Real images beside the teacher: a head on the fake network's middle tells them from the student's (DMD2)."""

    weight: float = Field(0.0, ge=0, description="weight of the adversarial loss for the student; 0: none of all this")
    critic_weight: float = Field(0.01, gt=0, description="weight of the head's loss beside the fake network's")
    hidden: int = Field(256, gt=0, description="width of the head")
    real: str | None = Field(
        None, description="a dataset folder, whose first image of every group is real, or testbed: rendered scenes"
    )
    n: int | None = Field(
        None, gt=0, description="only so many real images; null: all of a folder, as many scenes as prompts"
    )


class DistillTrainSection(Section):
    """Length and shape of the training."""

    steps: int = Field(1000, gt=0, description="updates of the student; DMD2 counts those of the fake network")
    groups_per_step: int = Field(
        8, gt=0, description="prompts of one update, over all processes and micro-batches, each with its group"
    )
    micro_batch: int = Field(8, gt=0, description="prompts in one forward pass; must divide groups_per_step")
    mixed_precision: Literal["auto", "no", "bf16"] = Field("auto", description="auto: bf16 on CUDA, no on CPU")
    max_grad_norm: float = Field(10.0, gt=0, description="both gradients are scaled down to this norm")
    ema_decay: float | None = Field(None, gt=0, lt=1, description="moving average of the student's weights; null: none")
    threads: int | None = Field(
        None, gt=0, description="CPU threads of torch; fix it where runs must agree bit for bit"
    )
    log_every: int = Field(1, gt=0, description="a row in metrics.jsonl every so many steps")
    cache_prompts: bool = Field(
        True, description="true: all prompts are encoded first and text encoders freed; false: as they come up"
    )


class StudentValidationSection(Section):
    """Images of prompts that are not trained on, drawn by the student's sampler; the best weights go to best/."""

    every: int | None = Field(None, gt=0, description="steps between validations; null: none")
    prompts: str | None = Field(
        None, description="a .txt or .jsonl file, or testbed:validation; never those of the final evaluation"
    )
    n: int | None = Field(None, gt=0, description="only so many prompts; null: all of a file, 256 of the testbed")
    rewards: list[RewardSection] = Field(
        [RewardSection()], min_length=1, description="what judges; the first column of the first decides what is best"
    )
    seeds: int = Field(1, gt=0, description="images per prompt")
    batch_size: int = Field(8, gt=0, description="images drawn at once")
    patience: int | None = Field(
        None, gt=0, description="stop after so many validations in a row without a better one; null: never"
    )


class DistillConfig(Section):
    """`diffalign distill`."""

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
    student: StudentSection = StudentSection()
    match: MatchSection = MatchSection()
    group: GroupSection = GroupSection()
    reward: RewardMixSection = RewardMixSection()
    fake: FakeSection = FakeSection()
    gan: GanSection = GanSection()
    train: DistillTrainSection = DistillTrainSection()
    optimizer: OptimizerSection = OptimizerSection()
    checkpoint: CheckpointSection = CheckpointSection()
    validation: StudentValidationSection = StudentValidationSection()
    on_alarm: Literal["warn", "stop"] = Field(
        "warn", description="what a health alarm does: say it and go on, or save and stop"
    )
    tracking: TrackingSection = TrackingSection()
    save_pipeline: bool = Field(
        True, description="true: also the whole student as a diffusers pipeline, student/; false: weights/ alone"
    )

    @model_validator(mode="before")
    @classmethod
    def _micro(cls, value: Any) -> Any:
        """A micro-batch that is not given is the largest divisor up to 8."""
        train = value.get("train") if isinstance(value, dict) else None
        groups = train.get("groups_per_step") if isinstance(train, dict) else None
        if isinstance(train, dict) and isinstance(groups, int) and groups > 0 and "micro_batch" not in train:
            micro = next(n for n in range(min(8, groups), 0, -1) if groups % n == 0)
            return {**value, "train": {**train, "micro_batch": micro}}
        return value

    @model_validator(mode="after")
    def _consistent(self) -> DistillConfig:
        check_distillation(self)
        check_memory_distillation(self)
        return self
