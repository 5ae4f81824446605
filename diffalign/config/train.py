"""The config of `diffalign train`: preference learning on a dataset folder."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from diffalign.config.data import DataSection, LabelSection, SelectionSection
from diffalign.config.images import SamplingSection
from diffalign.config.model import PolicySection
from diffalign.config.noise import GroupTimeSection, InversionSection, ReferenceSection
from diffalign.config.objective import DEFAULT_OBJECTIVE, OBJECTIVE_SECTIONS, AnyObjective
from diffalign.config.online import OnlineSection
from diffalign.config.run import WITHOUT_VALIDATION, BackboneRunConfig, ValidationSection
from diffalign.config.section import MISSING, UNAFFECTED, refuse
from diffalign.config.train_section import TrainSection


class SampledValidationSection(ValidationSection, SamplingSection):
    """Images of prompts that are not trained on, drawn and scored during training; the best weights go to best/."""


class TrainConfig(BackboneRunConfig):
    """Train a model on preference data."""

    compiles: ClassVar[bool] = True

    kind: Literal["train"] = Field("train", description="which verb reads this file")
    tune: PolicySection = PolicySection()
    data: DataSection = DataSection()
    labels: LabelSection = LabelSection()
    selection: SelectionSection = SelectionSection()
    objective: AnyObjective = DEFAULT_OBJECTIVE
    noise: Literal["shared", "independent", "inverted", "tracked", "path"] = Field(
        "shared",
        description="one noise for all images of a group, one each, each image's own by inversion, (tracked) the noise that "
        "made it, from its seed, or (path) the sampler's own steps in place of noised images (train.online)",
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
        if not self.tune.reference_moves:
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
                "a reference that moves was not shown to work with shard=fsdp2; use shard=none, or tune.reference=init",
                "tune.reference",
                "train.shard",
            )
        return self

    @model_validator(mode="after")
    def _check_images(self) -> TrainConfig:
        """Check that there is either a dataset or `train.online`."""
        online = self.train.online
        if online is None:
            if self.data.path is None:
                refuse(
                    f"{MISSING}; give data.path=... or write it into the file (a dataset folder), or let train.online draw the "
                    "images",
                    "data.path",
                )
            if self.tune.reference == "old":
                refuse(
                    "the old policy is the one that draws images during training; set train.online, or "
                    "tune.reference=init",
                    "tune.reference",
                    "train.online",
                )
            if self.noise == "path":
                refuse(
                    "only images that a run draws have paths; set train.online, or another noise",
                    "noise",
                    "train.online",
                )
            return self
        if self.data.path is not None:
            refuse(
                "train.online draws the images that are trained on; set data.path=null, or leave train.online out",
                "data.path",
                "train.online",
            )
        check_online(self, online)
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


DATASET_KEYS = ("split", "buckets", "latent_sampling", "limit")
"""Keys of `data` that choose among stored images."""


def check_online(config: TrainConfig, online: OnlineSection) -> None:
    """Refuse settings that concern a dataset, and those that `train.online` cannot have."""
    plain, data = DataSection().model_dump(), config.data.model_dump()
    stored = [key for key in DATASET_KEYS if data[key] != plain[key]]
    if stored:
        refuse("it concerns stored images, and train.online draws its own; leave it out", f"data.{stored[0]}")
    if config.selection.groups != "all" or config.selection.weight != "none":
        refuse(
            "it looks at all groups of a dataset, and train.online has those of one draw; leave it out",
            "selection.groups" if config.selection.groups != "all" else "selection.weight",
        )
    if config.reference.store is not None:
        refuse("no later run meets the same images; leave it out with train.online", "reference.store")
    if config.labels.source == "preference":
        refuse(
            "nobody ranks what is drawn; set labels.source=scores.NAME, NAME in train.online.rewards", "labels.source"
        )
    if config.objective.kind.label_kind == "role":
        refuse(f"{config.objective.name} needs real images beside the drawn ones; use rounds", "objective.name")
    if config.objective.kind.label_kind in ("advantage", "optimality") and config.tune.reference != "old":
        refuse(
            f"{config.objective.name} compares the policy with the one that drew the images; set tune.reference=old",
            "tune.reference",
            "objective.name",
        )
    if config.tune.reference != "old" and online.old != type(online.old)():
        refuse(
            "it moves the old policy, and there is none; set tune.reference=old, or leave it out", "train.online.old"
        )
    wanted = max(config.data.group_size or 0, *(config.selection.sizes or (0,)))
    if wanted > online.images_per_prompt:
        refuse(
            f"a step looks at {wanted} images of a group, and {online.images_per_prompt} are drawn; draw as many",
            "train.online.images_per_prompt",
            "data.group_size" if config.data.group_size else "selection.sizes",
        )
    check_path(config, online)


def check_path(config: TrainConfig, online: OnlineSection) -> None:
    """Refuse settings of noised images where the sampler's own steps take their place, and the other way round."""
    if config.noise != "path":
        if online.path != type(online.path)():
            refuse("it shapes the sampler's own steps; set noise=path, or leave it out", "train.online.path", "noise")
        return
    if online.steps < 2:
        refuse("the last step draws nothing, so a path needs two steps at least", "train.online.steps", "noise")
    if config.error_space != "native":
        refuse("a path's errors are log-probabilities, in no other space; leave it out with noise=path", "error_space")
    if config.times.model_copy(update={"stratified": False}) != type(config.times)():
        refuse("the times of a path are the sampler's; leave times out but for stratified", "times.sampler", "noise")
    if online.negative_prompt is not None:
        refuse("guidance within the policy steers away from no prompt; leave it out", "train.online.negative_prompt")
