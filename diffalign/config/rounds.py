"""The config of `diffalign rounds`: sample, score, rank, train, evaluate, and again."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from diffalign.config.images import SizedSamplingSection
from diffalign.config.run import PROMPT_COUNT, RewardSection
from diffalign.config.section import MOST_IMAGES, MOST_PROMPTS, FilePath, Section
from diffalign.config.synth import RankSection


class RoundImagesSection(SizedSamplingSection):
    """How images are drawn, for training data and for evaluation alike."""

    guidance_scale: float = Field(5.0, ge=0, description="classifier-free guidance in evaluation; 1: none")


class RoundDataSection(Section):
    """What each round is trained on; its images are drawn from the model that the round starts from."""

    prompts: str = Field(
        min_length=1, description="as in `diffalign sample`; of testbed:train every round draws its own"
    )
    n: int | None = Field(None, gt=0, le=MOST_PROMPTS, description=PROMPT_COUNT)
    images_per_prompt: int = Field(8, gt=0, le=MOST_IMAGES, description="images per prompt, one group")
    guidance_scale: float | None = Field(
        None, ge=0, description="guidance of the training images; null: as in evaluation. DDO wants none: 1"
    )
    rewards: list[RewardSection] = Field(
        default_factory=lambda: [RewardSection()], description="scored one after another; [] with real only"
    )
    rank: RankSection = Field(default_factory=RankSection, description="how scores become preferences")
    real: str | None = Field(
        None,
        description="self-play: testbed, or a dataset folder whose first image of every group is real and whose prompts are "
        "used; labels are then 1 for it and 0 for what the model drew. null: scores make the labels",
    )


class RoundEvalSection(Section):
    """How a round is judged. These prompts decide when to stop: keep others for the last word."""

    prompts: str = Field(min_length=1, description="held-out prompts, as in `diffalign eval`")
    n: int | None = Field(None, gt=0, le=MOST_PROMPTS, description=PROMPT_COUNT)
    seeds: int = Field(4, gt=0, le=MOST_IMAGES, description="images per prompt and model")
    reward: RewardSection = Field(default_factory=RewardSection, description="its first column is the held-out reward")
    more_rewards: list[RewardSection] = Field(
        default_factory=list, description="further rewards: what is not trained on shows over-optimisation"
    )


class RoundsConfig(Section):
    """Sample, score, rank, train, evaluate, and again from the last model."""

    kind: Literal["rounds"] = Field("rounds", description="which verb reads this file")
    out: FilePath = Field(description="folder of all rounds; the same command resumes where it stopped")
    rounds: int = Field(3, gt=0, description="most rounds")
    seed: int = Field(0, ge=0, le=2**62, description="round n takes seed + n - 1 for its prompts, images and training")
    train: str = Field(min_length=1, description="the training config: a YAML file, or the name of a shipped recipe")
    overrides: list[str] = Field(
        default_factory=list, description="values that replace those of the training config, as [train.steps=200]"
    )
    reference: Literal["last", "base"] = Field(
        "last", description="what a round is compared with: the model that it starts from, or always the base"
    )
    momentum: float = Field(
        0.0,
        ge=0,
        description="the next round starts beyond the last weights by this many times the last change (Accelerated "
        "Preference Optimization); 0: at the last weights",
    )
    patience: int | None = Field(
        1, gt=0, description="stop after this many rounds in a row without a better held-out reward; null: never"
    )
    images: RoundImagesSection = Field(default_factory=RoundImagesSection)
    data: RoundDataSection
    evaluate: RoundEvalSection
