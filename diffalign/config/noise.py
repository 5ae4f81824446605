"""Sections for noise levels, inversion, and what is kept of the reference model."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from diffalign.config.section import MOST_STEPS, FilePath, Section, refuse


class TimeSection(Section):
    """How the noise level of a group is drawn."""

    sampler: Literal["uniform", "logit_normal", "schedule"] = Field(
        "uniform",
        description="density of the times; schedule: the times at which the model's own sampler asks the network, all alike",
    )
    mean: float = Field(0.0, description="mean of the logit (logit_normal only)")
    std: float = Field(1.0, gt=0, description="standard deviation of the logit (logit_normal only)")
    shift: float = Field(
        1.0, gt=0, description="moves times towards noise: t -> shift t / (1 + (shift - 1) t); 1: not at all"
    )

    steps: int | None = Field(
        None, gt=0, le=MOST_STEPS, description="steps of the sampler whose times are drawn (schedule only)"
    )
    skip: int = Field(0, ge=0, description="how many of its noisiest times are never drawn (schedule only)")

    @model_validator(mode="after")
    def _check_schedule(self) -> TimeSection:
        if (self.sampler == "schedule") != (self.steps is not None):
            refuse("sampler=schedule and steps go together: times.steps=10 says which schedule", "steps", "sampler")
        if self.skip >= (self.steps or 1):
            refuse(
                f"skip={self.skip} leaves no time of {self.steps or 0} to draw; use times.sampler=schedule and skip fewer",
                "skip",
                "steps",
            )
        if self.sampler == "schedule" and self.shift != 1.0:
            refuse("the schedule has the model's own shift; leave times.shift out", "shift", "sampler")
        return self

    @model_validator(mode="after")
    def _check_shape(self) -> TimeSection:
        if self.sampler != "logit_normal" and (self.mean, self.std) != (0.0, 1.0):
            refuse(
                "mean and std shape logit_normal times only; set times.sampler=logit_normal or leave them out",
                "mean",
                "std",
            )
        return self


class GroupTimeSection(TimeSection):
    """How the noise level of a group is drawn."""

    stratified: bool = Field(
        False,
        description="true: the groups of a step cover the density evenly, one in each of groups_per_step equal parts of it",
    )

    def density(self) -> dict[str, Any]:
        """Return the arguments of `NoiseProcess.draw_times`."""
        return self.model_dump(exclude={"stratified"})


class InversionSection(Section):
    """How `noise: inverted` finds an image's noise: by running the sampler backwards (ReNoise)."""

    steps: int = Field(
        10, gt=0, le=MOST_STEPS, description="inversion steps from the image to pure noise; fewer to an earlier time"
    )
    iterations: int = Field(
        1, ge=0, description="ReNoise iterations of a step, each one more forward pass; 0: DDIM inversion"
    )
    average_from: int = Field(
        0,
        ge=0,
        description="average the predictions of a step from this one on; 0: all, iterations: only the last",
    )
    mode: Literal["consistent", "official"] = Field(
        "consistent",
        description="consistent: the steps end at the drawn time, and the network is given the time that it goes to; "
        "official: as SmPO's code (epsilon models only), which does neither",
    )
    by: Literal["policy", "reference"] = Field("policy", description="which model is run backwards")

    @model_validator(mode="after")
    def _check_average(self) -> InversionSection:
        if self.average_from > self.iterations:
            refuse(
                f"a step has {self.iterations + 1} predictions, numbered from 0: none is left to average; use at most "
                f"inversion.iterations={self.iterations}",
                "average_from",
                "iterations",
            )
        return self

    def changed(self) -> list[str]:
        """Return the keys whose values are not the defaults."""
        plain = InversionSection().model_dump()
        return [key for key, value in self.model_dump().items() if plain[key] != value]


class ReferenceSection(Section):
    """Whether the frozen reference's errors or predictions are stored for later runs on the same draws."""

    store: FilePath | None = Field(
        None,
        description="folder that the first run fills and later runs read instead of running the reference; null: none",
    )
    keep: Literal["errors", "predictions"] = Field(
        "errors",
        description="errors: 4 bytes an image, without the drift metric; predictions: a latent an image, with everything",
    )

    @property
    def errors_only(self) -> bool:
        """Whether the reference's predictions are not available."""
        return self.store is not None and self.keep == "errors"

    @model_validator(mode="after")
    def _check_keep(self) -> ReferenceSection:
        if self.store is None and self.keep != "errors":
            refuse("keep says what goes into a store, and there is none; set reference.store", "keep")
        return self
