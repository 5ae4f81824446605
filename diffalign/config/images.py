"""The configs of `diffalign sample` and `diffalign eval`, and the settings with which any stage draws images."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from diffalign.config.model import DEVICE, Device, ModelSection, check_device
from diffalign.config.run import PROMPT_COUNT, RewardSection
from diffalign.config.section import (
    MOST_IMAGES,
    MOST_PIXELS,
    MOST_PROMPTS,
    MOST_STEPS,
    FilePath,
    Section,
    refuse,
    refuse_twice,
)
from diffalign.files.paths import is_plain_name

SchedulerName = Literal["ddim", "ddpm", "dpmpp", "euler", "euler_ancestral", "flow_euler", "flow_heun", "heun", "unipc"]


class SchedulerSection(Section):
    """What integrates the model's prediction, in place of the model's own."""

    text_key: ClassVar[str | None] = "name"

    name: SchedulerName = Field(description="the sampler; flow_euler and flow_heun for rectified flow")
    options: dict[str, Any] = Field(default_factory=dict, description="its settings that differ from the model's own")


class SamplingSection(Section):
    """How images are drawn."""

    late: ClassVar[tuple[str, ...]] = ("steps", "guidance_scale", "negative_prompt", "height", "width", "batch_size")

    steps: int = Field(30, gt=0, le=MOST_STEPS, description="denoising steps")
    guidance_scale: float = Field(5.0, ge=0, description="classifier-free guidance; 1: none")
    negative_prompt: str | None = Field(None, description="what to steer away from")
    batch_size: int = Field(8, gt=0, le=MOST_IMAGES, description="images drawn at once")


class SizedSamplingSection(SamplingSection):
    """How images are drawn, and how large."""

    height: int | None = Field(None, gt=0, le=MOST_PIXELS, multiple_of=8, description="pixels; null: the model's own")
    width: int | None = Field(None, gt=0, le=MOST_PIXELS, multiple_of=8, description="pixels; null: the model's own")

    @model_validator(mode="after")
    def _check_size(self) -> SizedSamplingSection:
        if (self.height is None) != (self.width is None):
            refuse("give both height and width, or neither", "height" if self.width is None else "width")
        return self


class DrawingConfig(SizedSamplingSection):
    """A model, and how its images are drawn."""

    seed: int = Field(0, ge=0, description="seed of every draw")
    device: Device = Field("auto", description=DEVICE)
    model: ModelSection

    @model_validator(mode="after")
    def _check_model(self) -> DrawingConfig:
        check_device(self.model, self.device)
        return self


class BenchConfig(DrawingConfig):
    """Draw the images of published suites and judge them."""

    kind: Literal["bench"] = Field("bench", description="which verb reads this file")
    weights: FilePath | None = Field(
        None, description="a run's weights/ folder or checkpoint, or a LoRA; null: the model as it is"
    )
    out: FilePath = Field(description="the folder that gets bench.json, and a dataset folder for each suite")


class ImagesConfig(DrawingConfig):
    """What sampling and evaluation share: a model, prompts, and how the images are drawn."""

    prompts: str = Field(
        min_length=1,
        description="a .txt or .jsonl file; testbed:train, testbed:validation or testbed:test; suite:NAME:PATH, or "
        "suite:NAME:hub",
    )
    n: int | None = Field(None, gt=0, le=MOST_PROMPTS, description=PROMPT_COUNT)


class SampleConfig(ImagesConfig):
    """Draw images for prompts into a dataset folder."""

    kind: Literal["sample"] = Field("sample", description="which verb reads this file")
    weights: FilePath | None = Field(
        None, description="a run's weights/ folder or checkpoint, or a LoRA; null: the model as it is"
    )
    out: FilePath = Field(description="the dataset folder to write; the same command resumes where it stopped")
    images_per_prompt: int = Field(8, gt=0, le=MOST_IMAGES, description="images per prompt, one group")
    latents: bool = Field(
        False,
        description="true: keep each image's latent, so that training on the same model's VAE need not encode it again",
    )


class CorrectionSection(Section):
    """A score that falls where a reward is gained at the cost of quality: r (u - u0) + c, as GDRO reports."""

    reward: str = Field(min_length=1, description="r: a score, such as geneval.dense")
    quality: list[str] = Field(min_length=1, description="u is the mean of these scores")
    u0: float = Field(3.0, description="quality that counts as none (GDRO: 3 of UnifiedReward's 5)")
    c: float = Field(0.2, description="shift, only for plotting (GDRO: 0.2)")


class EvalConfig(ImagesConfig):
    """Compare a model without and with trained weights, on the same prompts and seeds."""

    kind: Literal["eval"] = Field("eval", description="which verb reads this file")
    weights: FilePath = Field(description="a run's weights/ folder or checkpoint, or a LoRA")
    seeds: int = Field(4, gt=0, le=MOST_IMAGES, description="images per prompt and model")
    reward: RewardSection = RewardSection()
    more_rewards: list[RewardSection] = Field(
        default_factory=list, description="further rewards: those that were not trained on show over-optimisation"
    )
    others: dict[str, FilePath] = Field(
        default_factory=dict, description="further weights against the same base, by name: folders or checkpoints"
    )
    checkpoints: bool = Field(False, description="true: also every checkpoint that the run has kept, as step-N")
    corrected: CorrectionSection | None = Field(None, description="the score corrected for lost quality; null: none")
    out: FilePath = Field(description="the folder that gets eval.json, eval/images and report.html")

    @model_validator(mode="after")
    def _check_names(self) -> EvalConfig:
        for name in self.others:
            # Names become folders.
            if name in ("base", "tuned") or not is_plain_name(name):
                refuse(f"{name!r} is taken or no plain name; use letters, digits, dots and dashes", "others")
        refuse_twice(
            [self.reward.written_name, *(reward.written_name for reward in self.more_rewards)],
            "a reward",
            "more_rewards",
            "reward.name",
        )
        return self
