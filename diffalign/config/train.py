"""The config of `diffalign train`: preference learning on a dataset folder."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_serializer, field_validator, model_validator

from diffalign.config.data import DataSection, LabelSection, SelectionSection
from diffalign.config.images import SamplingSection
from diffalign.config.model import PolicySection
from diffalign.config.noise import GroupTimeSection, InversionSection, ReferenceSection
from diffalign.config.objective import DEFAULT_OBJECTIVE, OBJECTIVE_SECTIONS, AnyObjective
from diffalign.config.run import (
    AUTO,
    MICRO_BATCH,
    WITHOUT_VALIDATION,
    AveragedStepSection,
    BackboneRunConfig,
    ValidationSection,
)
from diffalign.config.section import (
    MOST_IMAGES,
    ROUNDING,
    UNAFFECTED,
    refuse,
)


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

    @field_validator("micro_batch", mode="before")
    @classmethod
    def _read_auto(cls, value: object) -> object:
        return AUTO if value == "auto" else value

    @field_serializer("micro_batch", when_used="json")
    def _write_auto(self, value: int) -> int | str:
        return "auto" if value == AUTO else value


class SampledValidationSection(ValidationSection, SamplingSection):
    """Images of prompts that are not trained on, drawn and scored during training; the best weights go to best/."""


class TrainConfig(BackboneRunConfig):
    """Train a model on preference data."""

    compiles: ClassVar[bool] = True

    kind: Literal["train"] = Field("train", description="which verb reads this file")
    tune: PolicySection = PolicySection()
    data: DataSection
    labels: LabelSection = LabelSection()
    selection: SelectionSection = SelectionSection()
    objective: AnyObjective = DEFAULT_OBJECTIVE
    noise: Literal["shared", "independent", "inverted", "tracked"] = Field(
        "shared",
        description="one noise for all images of a group, one each, each image's own by inversion, or (tracked) the noise that "
        "made it, from its seed",
    )
    inversion: InversionSection = InversionSection()
    error_space: Literal["native", "epsilon", "x0"] = Field(
        "native", description="what the squared errors are errors of"
    )
    times: GroupTimeSection = GroupTimeSection()
    reference: Annotated[ReferenceSection, UNAFFECTED] = ReferenceSection()
    train: TrainSection = TrainSection()
    validation: Annotated[SampledValidationSection, WITHOUT_VALIDATION] = SampledValidationSection()

    @model_validator(mode="after")
    def _check_precision(self) -> TrainConfig:
        if self.device == "cpu" and self.train.mixed_precision == "fp16":
            refuse("fp16 needs a GPU; use no or bf16 with device=cpu", "train.mixed_precision", "device")
        return self

    @model_validator(mode="after")
    def _check_objective(self) -> TrainConfig:
        objective, labels = self.objective, self.labels
        unscaled = labels.source != "preference" and labels.transform in ("none", "zscore", "advantage")
        if unscaled and objective.build().unit_labels:
            refuse(
                f"{objective.name} compares scores between 0 and 1, and others would count as certain or as nothing; set "
                "labels.transform=minmax, or the objective's own bounds to the reward's",
                "labels.transform",
                "labels.source",
            )
        if objective.kind.label_kind == "advantage" and labels.transform not in ("none", "balanced", "advantage"):
            refuse(
                f"{objective.name} takes advantages, which are above 0 for good images of a group and below 0 for bad ones; "
                "set labels.transform=advantage",
                "labels.transform",
                "objective.name",
            )
        if self.train.auto_beta is not None and not objective.kind.single_margin:
            able = " and ".join(name for name, section in OBJECTIVE_SECTIONS.items() if section.kind.single_margin)
            refuse(
                f"auto_beta needs a beta and one margin a group that is proportional to it, as {able} have, not "
                f"{objective.name}; leave it out",
                "train.auto_beta",
                "objective.name",
            )
        if self.train.auto_beta is not None and objective.arguments().get("beta_end") is not None:
            refuse("both set beta from step to step; leave one of them out", "train.auto_beta", "objective.beta_end")
        return self

    @model_validator(mode="after")
    def _check_selection(self) -> TrainConfig:
        selection, labels = self.selection, self.labels
        if selection.images != "all" and self.data.group_size is not None:
            refuse(
                f"selection.images={selection.images} chooses the images of a step, and data.group_size draws them; leave "
                "one out",
                "selection.images",
                "data.group_size",
            )
        if selection.weight == "mean" and (labels.source == "preference" or labels.centred):
            refuse(
                "vote shares, dvao and balanced labels have the same mean in every group, so none would count more; set "
                "labels.source=scores.NAME, or selection.weight=gap",
                "selection.weight",
                "labels.source",
            )
        return self

    @model_validator(mode="after")
    def _check_inversion(self) -> TrainConfig:
        changed = self.inversion.changed()
        if changed and self.noise != "inverted":
            refuse(
                f"inversion has no effect with noise={self.noise}; set noise=inverted or leave it out",
                *(f"inversion.{key}" for key in changed),
                "noise",
            )
        return self

    @model_validator(mode="after")
    def _check_drift(self) -> TrainConfig:
        if self.train.drift_radius and not self.train.drift_weight:
            refuse("a radius does nothing without a weight; set train.drift_weight=100", "train.drift_radius")
        if not self.train.drift_weight:
            return self
        if not self.objective.kind.needs_reference:
            refuse(
                f"{self.objective.name} has no reference to drift from; leave drift_weight out",
                "train.drift_weight",
                "objective.name",
            )
        if self.reference.errors_only:
            refuse(
                "the drift needs the reference's predictions, not its errors alone; set reference.keep=predictions",
                "reference.keep",
                "train.drift_weight",
            )
        return self

    @model_validator(mode="after")
    def _check_average(self) -> TrainConfig:
        if self.tune.reference != "ema":
            return self
        if not self.objective.kind.needs_reference:
            refuse(
                f"{self.objective.name} has no reference; leave tune.reference out",
                "tune.reference",
                "objective.name",
            )
        if self.reference.store is not None:
            refuse(
                "the reference is another one at every step, so nothing can be kept; set reference.store=null, or "
                "tune.reference=init",
                "reference.store",
                "tune.reference",
            )
        if self.train.shard != "none":
            refuse(
                "an average as the reference was not shown to work with shard=fsdp2; use shard=none, or tune.reference=init",
                "tune.reference",
                "train.shard",
            )
        return self

    @model_validator(mode="after")
    def _check_reference(self) -> TrainConfig:
        if self.reference.store is None:
            return self
        if self.noise == "inverted" and self.inversion.by == "policy":
            refuse(
                "the noise is found by the policy, which is another one at every step, so nothing can be kept; set "
                "inversion.by=reference, or reference.store=null",
                "reference.store",
                "inversion.by",
            )
        if self.objective.kind.needs_gap and self.reference.keep == "errors":
            refuse(
                f"{self.objective.name} looks at the reference's predictions, not at its errors alone; set "
                "reference.keep=predictions",
                "reference.keep",
                "objective.name",
            )
        if not self.objective.kind.needs_reference and self.noise != "inverted":
            refuse(
                f"{self.objective.name} has no reference, and nothing would be kept; leave reference.store out",
                "reference.store",
                "objective.name",
            )
        return self

    @model_validator(mode="after")
    def _check_shard(self) -> TrainConfig:
        if self.train.shard == "none":
            return self
        if self.tune.kind != "full":
            refuse(
                "a LoRA leaves little to cut over processes; use shard=none, or tune.kind=full",
                "train.shard",
                "tune.kind",
            )
        if self.optimizer.name != "adamw" or self.optimizer.offload:
            refuse("shard=fsdp2 takes optimizer.name=adamw without offload", "train.shard", "optimizer.name")
        if self.validation.every is not None:
            refuse(
                "one process draws the images of a validation, and none has all weights with shard=fsdp2; set "
                "validation.every=null and evaluate afterwards",
                "train.shard",
                "validation.every",
            )
        if self.train.mixed_precision == "fp16":
            refuse("shard=fsdp2 has no loss scaling; use bf16", "train.shard", "train.mixed_precision")
        if self.reference.store is not None:
            # One process may have a micro-batch that another lacks, and a forward pass needs all of them.
            refuse(
                "processes that hold a part of the reference each must compute it together; set reference.store=null",
                "train.shard",
                "reference.store",
            )
        if self.train.images_per_pass is not None:
            refuse(
                "passes predict again while gradients flow, which was not shown to work with shard=fsdp2; use "
                "train.micro_batch=1 and model.gradient_checkpointing=true",
                "train.shard",
                "train.images_per_pass",
            )
        if self.model.compile is True:
            refuse(
                "compile with shard=fsdp2 was not shown to work; leave one of them out", "train.shard", "model.compile"
            )
        return self
