"""The `objective:` section: one model per objective, chosen by `name`.

These mirror the dataclasses in `diffalign.objectives.OBJECTIVES` (names, fields and defaults; a test compares them), so
that a config is checked, and `diffalign --help` answers, without importing torch.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field


class ObjectiveSection(BaseModel):
    """Base of the objectives' sections."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    name: str
    compares: ClassVar[bool] = True
    """True where the loss compares the images of a group, so that a group needs at least two."""

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the dataclass `OBJECTIVES[name]`."""
        return self.model_dump(exclude={"name"})


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


AnyObjective = Annotated[DiffusionDPOSection | SFTSection, Field(discriminator="name")]

OBJECTIVE_SECTIONS: dict[str, type[ObjectiveSection]] = {"dpo": DiffusionDPOSection, "sft": SFTSection}
