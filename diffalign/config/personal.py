"""The config of `diffalign judge personal`: a reward of one person's taste, fitted to their choices."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from diffalign.config.model import DEVICE, Device
from diffalign.config.section import MOST_IMAGES, FilePath, PlainName, Section, refuse


class PersonalConfig(Section):
    """Fit a reward of one person's taste to their choices."""

    text_key: ClassVar[str | None] = "data"

    kind: Literal["judge personal"] = Field("judge personal", description="which verb reads this file")
    data: FilePath = Field(description="a dataset folder with votes, or with preferences that people gave")
    source: str = Field(
        "human",
        min_length=1,
        description="whose choices: human for the votes of all, and for preferences that people gave otherwise; a rater's "
        "name; or scores, as reward or reward.column",
    )
    split: PlainName = Field("train", description="groups of which split; votes count wherever they are")
    features: str | None = Field(
        None,
        min_length=1,
        description="what is seen of an image: pixels, pickscore, clipscore, hpsv2 or vision, with the options of that "
        "reward, as clipscore:model=openai/clip-vit-large-patch14; null: the first of pickscore and hpsv2 whose weights are "
        "here, else pixels",
    )
    out: FilePath | None = Field(None, description="the folder to write; null: personal/SOURCE in the dataset's folder")
    ridge: float | None = Field(
        None, gt=0, description="strength of the penalty on squared weights; null: chosen on held-out prompts"
    )
    folds: int = Field(5, ge=2, le=100, description="parts of the prompts; each is held out once")
    seed: int = Field(0, ge=0, description="seed of the division into parts, and of the interval")
    batch_size: int = Field(64, gt=0, le=MOST_IMAGES, description="images seen at once")
    device: Device = Field("auto", description=DEVICE)

    @model_validator(mode="after")
    def _check_source(self) -> PersonalConfig:
        if self.source == "preference":
            refuse("preferences may come from a ranking; name whose they are: human, a rater or a reward", "source")
        return self
