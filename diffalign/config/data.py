"""The sections of a config that say which data is trained on, with which labels, and which of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from diffalign.config.section import (
    DERIVED,
    MOST_IMAGES,
    MOST_PIXELS,
    MOST_PROMPTS,
    NAMED,
    UNAFFECTED,
    FilePath,
    Section,
    Sizes,
    refuse,
)

STATISTICS = {"minmax": {"min", "max"}, "zscore": {"mean", "std"}}
ADVANTAGES = ("advantage", "optimality")


def _buckets(value: Any) -> str | list[list[int]]:
    """Check `buckets`, with one message for a value of neither form, where a union would have one for each."""
    whole = isinstance(value, list) and value and all(isinstance(size, list) and len(size) == 2 for size in value)
    sides = [side for size in value for side in size] if whole else []
    if value in ("none", "auto") or (sides and all(type(side) is int and 0 < side <= MOST_PIXELS for side in sides)):
        return cast("str | list[list[int]]", value)
    raise PydanticCustomError("buckets", "should be none, auto, or sizes such as [[1024, 1024], [1216, 832]]")


class DataSection(Section):
    """What is trained on."""

    text_key: ClassVar[str | None] = "path"

    path: Annotated[FilePath | None, NAMED] = Field(
        None, description="a dataset folder: images/, scores/, groups.parquet; null: train.online draws the images"
    )
    split: str = Field("train", min_length=1, description="the groups whose split has this name")
    resolution: int | None = Field(
        None,
        gt=0,
        le=MOST_PIXELS,
        multiple_of=8,
        description="images are resized and centre-cropped to this square, pixels; null: the model's",
    )
    buckets: Annotated[str | list[list[int]], PlainValidator(_buckets)] = Field(
        "none",
        description="none: squares; auto: each group gets the aspect of most of its images, at as many pixels as the square; "
        "or the sizes to choose from, as [[1024, 1024], [1216, 832]] (width, height)",
    )
    latent_sampling: Literal["mean", "posterior"] = Field(
        "mean",
        description="mean: the VAE's mean; posterior: a new sample each time, for which the cache also holds the spread",
    )
    cache: Annotated[Literal["all", "latents", "off"], UNAFFECTED] = Field(
        "all",
        description="what is encoded before the first step: all, latents (the text encoders stay loaded), off (the VAE too)",
    )
    cache_dir: Annotated[FilePath | None, UNAFFECTED] = Field(
        None, description="folder of the cache; null: <path>/cache"
    )
    cache_dtype: Literal["float32"] | None = Field(
        None,
        description="float32: latents and embeddings as they were encoded, in twice the space; null: latents are rounded to "
        "float16 and embeddings to bfloat16, in every mode of the cache",
    )
    limit: int | None = Field(None, gt=0, le=MOST_PROMPTS, description="use only the first n groups; null: all")
    group_size: int | None = Field(
        None,
        ge=2,
        le=MOST_IMAGES,
        description="images of a group in a step, drawn again each time the group comes up; null: all",
    )

    @property
    def folder(self) -> Path:
        """The dataset folder. Raises ValueError in a run that draws its own images."""
        if self.path is None:
            raise ValueError("this run reads no dataset")
        return self.path


class CombineSection(Section):
    """Several rewards as one label (`labels.source: combined`); each is z-scored over the dataset first."""

    how: Literal["sum", "dvao", "gated"] = Field(
        "sum",
        description="sum: the weighted sum; dvao: the same, over the weighted sum of the group's deviations; gated: images "
        "that pass more gates first, the sum's order among equals",
    )
    weights: dict[str, float] = Field(
        min_length=1, description="what is summed, as {geneval: 1.0, ocr.exact: 0.5}: a reward, or reward.column"
    )
    gates: dict[str, float] = Field(
        default_factory=dict, description="scores that an image should reach, as {geneval.exact: 1.0} (gated only)"
    )

    @model_validator(mode="after")
    def _check_weights(self) -> CombineSection:
        if any(weight < 0 for weight in self.weights.values()) or not any(self.weights.values()):
            refuse(
                "a weight below 0 would vote against its own reward, and one at least must be above 0",
                "weights",
            )
        if (self.how == "gated") != bool(self.gates):
            refuse("how=gated and gates go together, as gates={geneval.exact: 1.0}", "gates", "how")
        return self


class LabelSection(Section):
    """Where the labels that order a group's images come from."""

    source: str = Field(
        "preference",
        pattern=r"^(preference|combined|scores\.[^.]+(\.[^.]+)?)$",
        description="preference (of groups.parquet), scores.NAME (first column of a reward), scores.NAME.COLUMN, or "
        "combined",
    )
    combine: CombineSection | None = Field(
        None, description="how several rewards become one label (source combined only); null: they do not"
    )
    transform: Literal["none", "votes", "minmax", "zscore", "balanced", "advantage", "optimality"] = Field(
        "none",
        description="what is done to scores before they are used; balanced: less the group's mean, over its mean absolute "
        "deviation; advantage: less the group's mean, over a deviation, at most 5 either way (awm); optimality: a tenth of "
        "that plus 1/2, in [0, 1] (nft)",
    )
    spread: Literal["dataset", "group"] = Field(
        "dataset", description="whose deviation an advantage is divided by (transform advantage and optimality)"
    )
    stats: Annotated[dict[str, float] | None, DERIVED] = Field(
        None,
        description="{min, max} for minmax, {mean, std} for zscore, {std} for advantage and optimality, NAME.mean and NAME.std "
        "for combined; null: computed from the data",
    )

    @property
    def centred(self) -> bool:
        """Whether the labels of every group have the same mean."""
        return self.transform in ("votes", "balanced", *ADVANTAGES) or (
            self.combine is not None and self.combine.how == "dvao"
        )

    @model_validator(mode="after")
    def _check_source(self) -> LabelSection:
        if (self.source == "combined") != (self.combine is not None):
            refuse(
                "source=combined and combine go together: labels.source=combined "
                "'labels.combine={weights: {geneval: 1.0, pickscore: 1.0}}' says how",
                "source" if self.combine is None else "combine",
            )
        if self.source == "preference" and self.transform != "none":
            refuse(
                f"preference holds vote shares already, transform={self.transform} is for scores; set "
                "labels.source=scores.NAME or labels.transform=none",
                "transform",
                "source",
            )
        if self.combine is not None and self.transform in STATISTICS:
            refuse(
                f"combined labels are scaled already, transform={self.transform} is for one reward; use none, votes, "
                "balanced, advantage or optimality",
                "transform",
                "combine",
            )
        if self.spread != "dataset" and self.transform not in ADVANTAGES:
            refuse(
                f"only advantages have a spread, transform={self.transform} has none; leave it out, or set "
                "labels.transform=advantage",
                "spread",
                "transform",
            )
        return self

    @model_validator(mode="after")
    def _check_stats(self) -> LabelSection:
        if self.stats is None:
            return self
        wanted = STATISTICS.get(self.transform)
        if self.transform in ADVANTAGES and self.spread == "dataset":
            wanted = {"std"}
        if self.combine is not None:
            wanted = {f"{name}.{part}" for name in self.combine.weights for part in ("mean", "std")} | (wanted or set())
        if wanted is None:
            refuse(
                "statistics serve minmax, zscore and combined labels, and advantages with the spread of the dataset, not "
                f"transform={self.transform}; leave stats out",
                "stats",
                "transform",
            )
        if set(self.stats) != wanted:
            what = self.transform if self.combine is None else "source=combined"
            refuse(f"{what} takes exactly {' and '.join(sorted(wanted))}", "stats")
        return self


class SelectionSection(Section):
    """Which groups and images a step looks at, and how much a group counts."""

    groups: Literal["all", "curriculum"] = Field(
        "all", description="curriculum: first those whose labels lie farthest apart, phase by phase more of them"
    )
    images: Literal["all", "variance", "rank_gap", "score_gap"] = Field(
        "all",
        description="variance: those whose labels differ most; rank_gap, score_gap: the best and one other, from the "
        "farthest to the closest, phase by phase",
    )
    phases: int = Field(
        3, ge=1, le=MOST_IMAGES, description="equal parts of the run (curriculum, rank_gap and score_gap)"
    )
    sizes: Sizes | None = Field(
        None, description="[first, last]: images of a group at the start and at the end (variance only)"
    )
    weight: Literal["none", "gap", "mean"] = Field(
        "none", description="gap: groups of close labels count more; mean: groups of a low mean label do"
    )
    strength: float = Field(0.5, gt=0, le=1, description="of weight=gap: weights lie within 1 -/+ strength")
    temperature: float = Field(2.0, gt=0, description="of weight=mean, in the labels' unit; smaller: more uneven")

    @model_validator(mode="after")
    def _check_phases(self) -> SelectionSection:
        by_phase = self.groups == "curriculum" or self.images in ("rank_gap", "score_gap")
        if self.phases != 3 and not by_phase:
            refuse(
                "nothing goes by phases; set selection.groups=curriculum or selection.images=rank_gap, or leave it out",
                "phases",
                "groups",
            )
        if (self.images == "variance") != (self.sizes is not None):
            refuse(
                "images=variance and sizes go together: selection.sizes=[4, 8] says how many images", "sizes", "images"
            )
        if self.sizes is not None and min(self.sizes) < 2:
            refuse("a preference needs at least two images", "sizes")
        return self
