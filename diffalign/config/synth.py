"""The configs of `diffalign synth` and `diffalign rank`."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from diffalign.config.images import SchedulerSection, SizedSamplingSection
from diffalign.config.model import DEVICE, Device, ModelSection, check_device
from diffalign.config.run import PROMPT_COUNT, RewardSection
from diffalign.config.section import (
    MOST_IMAGES,
    MOST_PROMPTS,
    MOST_THREADS,
    FilePath,
    PlainName,
    Section,
    refuse,
    refuse_twice,
)
from diffalign.files.paths import NOT_PLAIN, is_plain_name


class PromptSection(Section):
    """Which prompts."""

    text_key: ClassVar[str | None] = "source"

    source: str = Field(
        min_length=1,
        description="a .txt, .jsonl, .csv or .parquet file or the address of one (s3://), a folder with <split>.txt or "
        "<split>_metadata.jsonl, hub:OWNER/DATASET, or testbed:train, testbed:validation, testbed:test",
    )
    column: str = Field("prompt", min_length=1, description="the prompt's column (csv, parquet, hub)")
    split: str = Field("train", min_length=1, description="which split (folder, hub)")
    n: int | None = Field(None, gt=0, le=MOST_PROMPTS, description=PROMPT_COUNT)
    unique: bool = Field(True, description="true: leave out a prompt that repeats")


class GeneratorSection(SizedSamplingSection):
    """A model that draws images, and how."""

    name: PlainName = Field(description="how the dataset names it")
    model: ModelSection
    prior: str | None = Field(None, description="folder or id of the first stage (Stable Cascade only)")
    weights: FilePath | None = Field(
        None, description="a LoRA, or a run's weights/ folder or checkpoint; null: the model as it is"
    )
    scheduler: SchedulerSection | None = Field(None, description="null: the model's own")
    images_per_prompt: int = Field(1, gt=0, le=MOST_IMAGES, description="images of every prompt")
    batch_size: int = Field(
        8, gt=0, le=MOST_IMAGES, description="images drawn at once; part of the plan, as it decides their last bits"
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="further arguments of a pipeline that is only drawn from, such as decoder_steps",
    )
    licence: str | None = Field(None, description="licence of the model, for the dataset's card; null: looked up by id")


class LimitSection(Section):
    """Images outside are left out of the ranking."""

    source: str = Field(min_length=1, description="a reward, or reward.column")
    min: float | None = Field(None, description="lowest score that stays; null: no floor")
    max: float | None = Field(None, description="highest score that stays; null: no ceiling")


def split_problem(splits: dict[str, float]) -> str | None:
    """Return what is wrong with the shares of splits, with the remedy; None if they can be used."""
    if "train" in splits:
        return "train gets what the other splits leave; name only those"
    odd = [name for name in splits if not is_plain_name(name)]
    if odd:
        return f"{odd[0]!r} {NOT_PLAIN}"
    if not all(share >= 0 for share in splits.values()) or not sum(splits.values()) < 1:
        return "shares must be positive and leave some prompts to train"
    return None


class RankSection(Section):
    """How scores become preferences."""

    sources: list[str] | None = Field(
        None,
        min_length=1,
        description="the rewards that vote, as geneval or geneval.exact, and human, the preferences that people gave; null: "
        "human where there are any, else all rewards by their first columns",
    )
    aggregate: Literal["votes", "mean"] = Field(
        "votes", description="votes: share of won comparisons; mean: order by the mean of z-scores"
    )
    weights: dict[str, float] = Field(default_factory=dict, description="weight of a voter, by its name in sources; 1")
    min_gap: float = Field(
        0.0, ge=0, description="drop groups whose best and worst differ by less (shares, or units of the mean)"
    )
    choose: Literal["all", "extremes", "random", "variance"] = Field(
        "all", description="which k images of a group count: best and worst, any, or those that differ most"
    )
    k: int | None = Field(None, ge=2, description="how many images of a group count; null: all")
    limits: list[LimitSection] = Field(default_factory=list, description="floors and ceilings on scores")
    duplicates: int | None = Field(
        None,
        ge=0,
        le=64,
        description="leave out images within this many of 64 hash bits of a better one; null: all stay",
    )
    splits: dict[str, float] | None = Field(
        None,
        description="share of the prompts in each split but train, as {test: 0.05}; alone it leaves labels as they are; null: "
        "as they are",
    )
    seed: int = Field(0, ge=0, description="seed of random choices and of the split")

    @model_validator(mode="after")
    def _check_choice(self) -> RankSection:
        if (self.choose == "all") != (self.k is None):
            refuse("choose and k go together: choose=extremes, random or variance, and k=4 say", "choose", "k")
        return self

    @model_validator(mode="after")
    def _check_splits(self) -> RankSection:
        if self.splits is not None and (problem := split_problem(self.splits)):
            refuse(problem, "splits")
        return self

    @model_validator(mode="after")
    def _check_weights(self) -> RankSection:
        unknown = set(self.weights) - set(self.sources or self.weights)
        if unknown:
            refuse(f"{sorted(unknown)[0]} is not among sources", "weights", "sources")
        if any(weight < 0 for weight in self.weights.values()):
            refuse("a weight below 0 would vote against its own reward", "weights")
        return self


class RankConfig(RankSection):
    """Turn stored scores into preferences again."""

    kind: Literal["rank"] = Field("rank", description="which verb reads this file")
    data: FilePath = Field(description="a dataset folder that was scored")
    shuffle: bool = Field(
        False, description="true: the control that gives a group's preferences to its images at random"
    )


class SynthConfig(Section):
    """Make a ranked dataset from prompts: draw images, score them, rank them."""

    kind: Literal["synth"] = Field("synth", description="which verb reads this file")
    out: FilePath = Field(description="the dataset folder to write; the same command resumes where it stopped")
    seed: int = Field(0, ge=0, description="seed of every image's noise")
    device: Device = Field("auto", description=DEVICE)
    threads: int | None = Field(
        None,
        gt=0,
        le=MOST_THREADS,
        description="CPU threads of torch; fix it where runs must agree bit for bit; null: torch's choice",
    )
    engine: str = Field(
        "local",
        min_length=1,
        description="local; ray, for the Ray cluster of this machine or of RAY_ADDRESS; ray://HOST:PORT, for one elsewhere",
    )
    actors: int | None = Field(
        None, gt=0, le=MOST_THREADS, description="models on the cluster at most; null: as many as fit"
    )
    upload: str | None = Field(
        None, min_length=1, description="address to which the finished dataset is copied, such as s3://bucket/data"
    )
    prompts: PromptSection
    generators: list[GeneratorSection] = Field(min_length=1, description="drawn one after another")
    rewards: list[RewardSection] = Field(default_factory=list, description="scored one after another; []: no ranking")
    reward_batch: int = Field(64, gt=0, le=MOST_IMAGES, description="images scored at once")
    rank: RankSection = RankSection()
    split: PlainName = Field("train", description="the split that the groups get unless rank.splits says other")
    latents: bool = Field(
        False, description="true: store the latents too, where the generator is one that can be trained here"
    )
    contact_sheet: int = Field(50, ge=0, le=MOST_IMAGES, description="prompts shown in contact.html; 0: no such page")
    price_per_hour: float | None = Field(None, gt=0, description="of the machine, for the estimate of --dry-run")

    @model_validator(mode="after")
    def _check_actors(self) -> SynthConfig:
        if self.actors is not None and self.engine == "local":
            refuse("only a cluster has actors; set engine=ray", "actors")
        return self

    @model_validator(mode="after")
    def _check_names(self) -> SynthConfig:
        refuse_twice([generator.name for generator in self.generators], "a generator", "generators")
        names = [reward.written_name for reward in self.rewards]
        if len(set(names)) < len(names):
            refuse(
                "a reward is named twice; its columns can vote separately, as rank.sources=[geneval.exact]", "rewards"
            )
        for generator in self.generators:
            check_device(generator.model, self.device)
        return self
