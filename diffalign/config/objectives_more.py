"""Sections of the objectives beyond the core, as in `config_objectives`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from diffalign.config.objective_base import ObjectiveSection

BETA = "as Diffusion-DPO's: for mean errors, with the factor 1/2"


class IPOSection(ObjectiveSection):
    """IPO (Azar et al. 2023): the margin is led to 1/2, not raised without end."""

    name: Literal["ipo"] = Field("ipo", description="IPO")
    beta: float = Field(2000.0, gt=0, description=BETA)


class SimPOSection(ObjectiveSection):
    """SimPO (Meng et al. 2024): the policy's own errors, no reference, a margin to be ahead by."""

    name: Literal["simpo"] = Field("simpo", description="SimPO, reference-free")
    beta: float = Field(
        20.0,
        gt=0,
        description="scale of the difference of the two errors, mean errors, with the factor 1/2; no reference takes off "
        "what the images differ by, so it must be far smaller than Diffusion-DPO's",
    )
    gamma: float = Field(0.5, ge=0, description="margin that the winner must be ahead by")
    anchor: float = Field(0.0, ge=0, description="adds so many times the policy's error on the winner; 0: none")


class MADPOSection(ObjectiveSection):
    """MADPO (Rho 2025): Diffusion-DPO, each pair weighted by how far apart the scores are."""

    name: Literal["madpo"] = Field("madpo", description="MADPO, margin-adaptive")
    beta: float = Field(2000.0, gt=0, description=BETA)
    hard: float = Field(4.0, gt=0, description="where scores are close, lead to so many times their margin")
    easy: float = Field(0.5, gt=0, description="where they are far apart, to so many times it")
    reward_scale: float = Field(
        1.0,
        gt=0,
        description="difference of scores at which the better image would win about 73 of 100 comparisons",
    )


class ConstrainedSection(ObjectiveSection):
    """Diffusion-DPO whose winner's error may not rise (ours, in the spirit of CPO, Xu et al. 2024)."""

    name: Literal["constrained"] = Field("constrained", description="Diffusion-DPO under a constraint on the winner")
    beta: float = Field(2000.0, gt=0, description=BETA)
    weight: float = Field(
        1.0,
        gt=0,
        description="of what the winner's error rises by, in the margin's unit; above 1 it outweighs the pull",
    )


class DisCOSection(ObjectiveSection):
    """DisCO (Li et al. 2025): good images against the hard ones among the bad, within a trust region."""

    name: Literal["disco"] = Field("disco", description="DisCO")
    beta: float = Field(20.0, gt=0, description="scale of the implicit reward, for mean errors")
    tau: float | None = Field(
        1.0, gt=0, description="small: only the bad image that the policy likes best counts; null: all alike"
    )
    threshold: float | None = Field(
        None, description="a label of so much or more is good; null: above the mean of the group"
    )
    radius: float = Field(
        0.01, ge=0, description="mean squared difference to the reference's predictions that is free of charge"
    )
    trust: float = Field(1000.0, ge=0, description="weight of the square of what lies beyond the radius")


class DDOSection(ObjectiveSection):
    """DDO (Zheng et al. 2025): real images against those that the reference drew."""

    name: Literal["ddo"] = Field("ddo", description="DDO; labels are 1 for real images and 0 for generated ones")
    alpha: float = Field(4.0, gt=0, description="weight of the generated images")
    beta: float = Field(
        50.0,
        gt=0,
        description="scale for mean errors: the paper's 0.01 to 0.1 times the number of the latent's elements",
    )
