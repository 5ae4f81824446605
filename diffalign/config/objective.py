"""The `objective:` section: one model per objective, chosen by `name`.

These mirror the dataclasses in `diffalign.objectives.OBJECTIVES` (names, fields and defaults; a test compares them), so
that a config is checked, and `diffalign --help` answers, without importing torch. Those beyond the core are in
`config_objectives_more.py`.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from diffalign.config.objective_base import ObjectiveSection
from diffalign.config.objectives_more import (
    ConstrainedSection,
    DDOSection,
    DisCOSection,
    IPOSection,
    MADPOSection,
    SimPOSection,
)


class DiffusionDPOSection(ObjectiveSection):
    """Diffusion-DPO (Wallace et al. 2023): best against worst image of the group."""

    name: Literal["dpo"] = Field("dpo", description="Diffusion-DPO")
    beta: float = Field(
        2000.0,
        gt=0,
        description="strength of the pull to the reference; belongs to errors that are a mean over the latent's "
        "elements, with the factor 1/2 of the paper's code. Larger stays nearer to the reference",
    )
    loser_weight: float = Field(
        1.0, ge=0, le=1, description="below 1 the loser's error counts less, so it cannot carry the margin alone"
    )
    margin_clamp: float | None = Field(None, gt=0, description="a margin above this pulls no further; null: no bound")
    anchor: float = Field(0.0, ge=0, description="adds so many times the policy's error on the winner; 0: none")


class SFTSection(ObjectiveSection):
    """Supervised fine-tuning on the best image of the group; no reference model."""

    name: Literal["sft"] = Field("sft", description="fine-tune on the best image of each group")
    compares: ClassVar[bool] = False


class RankDPOSection(ObjectiveSection):
    """RankDPO (Karthik et al. 2024): every preferred pair of the group, weighted by how far apart its labels are."""

    name: Literal["rankdpo"] = Field("rankdpo", description="RankDPO; labels are vote shares in [0, 1]")
    beta: float = Field(
        2500.0,
        gt=0,
        description="strength of the pull to the reference, for mean errors and without the factor 1/2: half of what "
        "Diffusion-DPO calls beta",
    )
    pair_weight: Literal["delta", "gain", "none"] = Field(
        "delta", description="delta: gain times discount, as the paper; gain: without discount; none: all pairs alike"
    )
    ranked_by: Literal["labels", "model"] = Field(
        "labels", description="whose ranks the discount takes; model: the policy's own, as LiPO has it"
    )


class SmPOSection(ObjectiveSection):
    """SmPO-Diffusion (Lu et al. 2025): Diffusion-DPO, stronger the further apart the two scores are."""

    name: Literal["smpo"] = Field("smpo", description="SmPO-Diffusion")
    beta: float = Field(2000.0, gt=0, description="as Diffusion-DPO's: for mean errors, with the factor 1/2")
    gamma: float = Field(10.0, gt=0, description="how much the difference of the scores matters")
    reward_min: float = Field(
        0.0, description="score that counts as 0; leave 0 and 1 where labels.transform=minmax has scaled the labels"
    )
    reward_max: float = Field(1.0, description="score that counts as 1")

    @model_validator(mode="after")
    def _bounds(self) -> SmPOSection:
        if self.reward_max <= self.reward_min:
            raise PydanticCustomError(
                "bounds", "should have reward_max above reward_min={low}", {"low": self.reward_min}
            )
        return self


class GDROSection(ObjectiveSection):
    """GDRO (Wang et al. 2026): listwise cross-entropy of implicit and explicit reward, and a pull to the best image."""

    name: Literal["gdro"] = Field("gdro", description="GDRO")
    beta: float = Field(
        12.0,
        gt=0,
        description="scale of the implicit reward, for mean errors; set it so that implicit_spread in the metrics "
        "reaches about 0.3 to 3",
    )
    tau: float = Field(
        0.05, ge=0, description="temperature of the explicit rewards, in their unit; 0: ranks only (Plackett-Luce)"
    )
    gamma: float = Field(0.5, ge=0, description="weight of the policy's error on the best image of the group")


AnyObjective = Annotated[
    DiffusionDPOSection
    | SFTSection
    | RankDPOSection
    | SmPOSection
    | GDROSection
    | IPOSection
    | SimPOSection
    | MADPOSection
    | ConstrainedSection
    | DisCOSection
    | DDOSection,
    Field(discriminator="name"),
]

OBJECTIVE_SECTIONS: dict[str, type[ObjectiveSection]] = {
    "dpo": DiffusionDPOSection,
    "sft": SFTSection,
    "rankdpo": RankDPOSection,
    "smpo": SmPOSection,
    "gdro": GDROSection,
    "ipo": IPOSection,
    "simpo": SimPOSection,
    "madpo": MADPOSection,
    "constrained": ConstrainedSection,
    "disco": DisCOSection,
    "ddo": DDOSection,
}
