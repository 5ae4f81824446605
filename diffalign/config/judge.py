"""The config of `diffalign judge`: training a teacher that reasons before it scores, or a student that scores at once."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from diffalign.config.run import PRECISION, STEPS, RunConfig, StepSection
from diffalign.config.section import (
    MOST_IMAGES,
    MOST_PROMPTS,
    MOST_RANK,
    NAMED,
    ROUNDING,
    UNAFFECTED,
    FilePath,
    Section,
    refuse,
)

METHODS = {"teacher": ("gdso", "grpo", "sft", "bt"), "student": ("risd", "sft", "opd")}


class JudgeModelSection(Section):
    """Which image-text model, and how it is loaded."""

    text_key: ClassVar[str | None] = "path"

    path: Annotated[FilePath, NAMED] = Field(
        description="a transformers folder with processor and chat template, or a judge's weights/"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="number type of the frozen weights")
    labels: Literal["digits", "letters"] | None = Field(
        None, description="the nine labels; null: those that a judge's folder names, else digits"
    )
    rubrics: list[str] | None = Field(
        None,
        min_length=1,
        description="dimensions as NAME or NAME=FILE; null: those that a judge's folder names, else our four",
    )
    gradient_checkpointing: Annotated[bool, UNAFFECTED] = Field(
        False, description="true: less memory, more time, same gradients"
    )


class JudgeTuneSection(Section):
    """What is trained."""

    kind: Literal["lora", "full"] = Field("lora", description="low-rank adapters, or all weights")
    rank: int = Field(16, gt=0, le=MOST_RANK, description="rank of the adapters (lora only)")
    alpha: float = Field(32.0, gt=0, description="the adapters' output is scaled by alpha / rank (lora only)")
    targets: list[str] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        min_length=1,
        description="module names that get adapters (lora only)",
    )


class JudgeDataSection(Section):
    """What is trained on."""

    pairs: Annotated[FilePath | None, NAMED] = Field(
        None, description="pairs.jsonl: winners and losers with their scores; not for risd"
    )
    distributions: Annotated[FilePath | None, NAMED] = Field(
        None, description="distributions.jsonl of `diffalign judge-distributions` (risd only)"
    )
    limit: int | None = Field(None, gt=0, le=MOST_PROMPTS, description="use only the first n records; null: all")


class RolloutSection(Section):
    """How reasoning traces are sampled (gdso, grpo and opd only)."""

    traces: int = Field(8, gt=0, le=MOST_IMAGES, description="traces of each image, G")
    max_tokens: int = Field(512, gt=0, le=MOST_IMAGES, description="longest trace, in tokens")
    temperature: float = Field(1.0, gt=0, description="of the sampling; log-probabilities are those of this policy")
    batch_size: Annotated[int, ROUNDING] = Field(64, gt=0, le=MOST_IMAGES, description="traces sampled at once")


class JudgeLossSection(Section):
    """Weights of GDSO's terms, and how the policy learns (gdso and grpo only). The paper prints no value of these."""

    pointwise_reward: float = Field(1.0, ge=0, description="lambda_pt: of 1 - |mean - score| / 4 in a trace's reward")
    pairwise_reward: float = Field(1.0, ge=0, description="lambda_pw: of the gap to the other image (gdso only)")
    pointwise: float = Field(1.0, ge=0, description="alpha_pt: of the cross-entropy at the score position (gdso only)")
    pairwise: float = Field(1.0, ge=0, description="alpha_pw: of the gap error at the score position (gdso only)")
    kl: float = Field(0.01, ge=0, description="beta: of the KL to the policy of the outer iteration; 0: none")
    outer_steps: int = Field(
        50, gt=0, description="steps of an outer iteration, after which that policy is the current one"
    )
    inner_updates: int = Field(
        1, gt=0, description="updates on the same traces; from the second on with the clipped ratio"
    )
    clip: float = Field(0.2, gt=0, lt=1, description="how far the ratio to the sampling policy counts")
    length: Literal["mean", "sum"] = Field(
        "mean", description="over a trace's tokens; the paper prints the sum, which grows with the trace"
    )
    advantage_eps: float = Field(1e-4, gt=0, description="guard of the division by a group's deviation")


class JudgeTrainSection(StepSection):
    """Length and shape of the training."""

    drawn: ClassVar[str] = "records_per_step"
    member: ClassVar[str] = "records"
    largest_micro_batch: ClassVar[int] = 4

    steps: Annotated[int, STEPS] = Field(
        400, gt=0, description="steps; each samples its own traces and makes loss.inner_updates updates"
    )
    mixed_precision: Annotated[Literal["auto", "no", "bf16"], NAMED] = Field("auto", description=PRECISION)
    records_per_step: int = Field(8, gt=0, le=MOST_IMAGES, description="pairs, or distributions, of one step")


class JudgeConfig(RunConfig):
    """Train a model that scores images: a teacher that reasons first, or a student that scores at once."""

    kind: Literal["judge"] = Field("judge", description="which verb reads this file")
    role: Literal["teacher", "student"] = Field(description="teacher: reasons, then scores; student: scores at once")
    method: Literal["gdso", "grpo", "sft", "bt", "risd", "opd"] = Field(
        description="teacher: gdso, grpo, sft or bt (which does not reason); student: risd, sft or opd (which reasons)"
    )
    model: JudgeModelSection
    teacher: Annotated[FilePath | None, NAMED] = Field(None, description="the teacher's folder (opd only)")
    tune: JudgeTuneSection = JudgeTuneSection()
    data: JudgeDataSection
    rollout: RolloutSection = RolloutSection()
    loss: JudgeLossSection = JudgeLossSection()
    train: JudgeTrainSection = JudgeTrainSection()

    @model_validator(mode="after")
    def _check_method(self) -> JudgeConfig:
        if self.method not in METHODS[self.role]:
            refuse(
                f"a {self.role} is trained by {', '.join(METHODS[self.role])}, not by {self.method}", "method", "role"
            )
        wanted, other = ("distributions", "pairs") if self.method == "risd" else ("pairs", "distributions")
        given = self.data.model_dump()
        if given[wanted] is None:
            refuse(f"{self.method} learns from {wanted}; give data.{wanted}=FILE", "data")
        if given[other] is not None:
            refuse(f"{self.method} does not read {other}; leave it out", f"data.{other}")
        if (self.method == "opd") != (self.teacher is not None):
            refuse("opd asks a teacher at every step, and no other method does", "teacher", "method")
        # The other methods change what the run's weights are compared with.
        if self.method in ("sft", "bt", "risd", "opd") and self.loss.inner_updates != 1:
            refuse(f"{self.method} learns from each batch once", "loss.inner_updates")
        return self

    @model_validator(mode="after")
    def _check_dtype(self) -> JudgeConfig:
        if self.tune.kind == "full" and self.model.dtype != "float32":
            refuse(
                "all weights train in float32; set model.dtype=float32, or tune.kind=lora", "model.dtype", "tune.kind"
            )
        if self.model.dtype == "float16" and self.device == "cpu":
            refuse("float16 is for GPUs; use float32 or bfloat16", "model.dtype", "device")
        return self
