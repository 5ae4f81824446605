"""The `train` section of preference training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_serializer, field_validator

from diffalign.config.online import OnlineSection
from diffalign.config.run import AUTO, MICRO_BATCH, AveragedStepSection
from diffalign.config.section import MOST_IMAGES, ROUNDING


class TrainSection(AveragedStepSection):
    """Length and shape of the training."""

    groups_per_step: int = Field(
        8, gt=0, le=MOST_IMAGES, description="groups in one optimiser step, over all processes and micro-batches"
    )
    micro_batch: Annotated[int, MICRO_BATCH] = Field(
        8,
        ge=AUTO,
        le=MOST_IMAGES,
        description="groups in one forward pass; must divide groups_per_step. auto: as many as the GPU is predicted to hold, "
        "at most 16; the run's config.yaml keeps the number. Not given: the largest divisor up to 8",
    )
    images_per_pass: Annotated[int | None, ROUNDING] = Field(
        None,
        gt=0,
        le=MOST_IMAGES,
        description="images of a micro-batch in the model at a time, for one more forward pass and the same gradient; null: "
        "all, or one where all do not fit the GPU's memory",
    )
    prompt_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of groups whose prompt is replaced by what sampling steers away from: zeros for SDXL, else the "
        "empty prompt",
    )
    skip_grad_norm: float | None = Field(
        None, gt=1, description="skip steps whose gradient norm is more than this times the recent median; null: none"
    )
    drift_radius: float = Field(
        0.0, ge=0, description="mean squared difference to the reference's predictions without a penalty (drift_weight)"
    )
    drift_weight: float = Field(
        0.0,
        ge=0,
        description="weight of what the drift exceeds drift_radius by, for any objective with a reference; 0: none",
    )
    auto_beta: float | None = Field(
        None,
        gt=0,
        lt=0.5,
        description="find beta so that the gradient factor becomes this, as 0.3 (dpo and smpo); null: off",
    )
    shard: Literal["none", "fsdp2"] = Field(
        "none", description="fsdp2: cut weights, gradients and averages over the processes (tune.kind full, adamw)"
    )

    online: OnlineSection | None = Field(
        None,
        description="draw and score images during training and learn from these; null: read the dataset in data.path",
    )

    @field_validator("micro_batch", mode="before")
    @classmethod
    def _read_auto(cls, value: object) -> object:
        return AUTO if value == "auto" else value

    @field_serializer("micro_batch", when_used="json")
    def _write_auto(self, value: int) -> int | str:
        return "auto" if value == AUTO else value
