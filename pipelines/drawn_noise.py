"""The noise that an image was drawn from: how it follows from the seed, and whether that is all the noise there was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor

from diffalign.errors import DiffalignError

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

# Samplers that draw no noise in their steps, with the settings under which that holds: key -> values that do not.
DETERMINISTIC: dict[str, dict[str, tuple[object, ...]]] = {
    "DDIMScheduler": {},
    "DPMSolverMultistepScheduler": {"algorithm_type": ("sde-dpmsolver", "sde-dpmsolver++")},
    "DPMSolverSinglestepScheduler": {"algorithm_type": ("sde-dpmsolver", "sde-dpmsolver++")},
    "EulerDiscreteScheduler": {},
    "FlowMatchEulerDiscreteScheduler": {"stochastic_sampling": (True,)},
    "FlowMatchHeunDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
    "PNDMScheduler": {},
    "UniPCMultistepScheduler": {},
}


class NoiseRecord(TypedDict):
    """What an image's provenance says about the noise it was drawn from.

    exact: whether the image follows from `initial_noise` of its seed alone. family: of the model; shape: [C, h, w] of the
    noise; sampler: the scheduler's class; reason: why it is not exact, "" where it is.
    """

    exact: bool
    family: str
    shape: list[int]
    sampler: str
    reason: str


def initial_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Return the unit noise of each seed, [B, *shape] float32: what torch's CPU generator gives a plain diffusers pipeline.

    Raises DiffalignError for seeds of more bits than the generator reads.
    """
    return torch.cat([torch.randn((1, *shape), generator=g, dtype=torch.float32) for g in seeded(seeds)])


def seeded(seeds: Sequence[int]) -> list[torch.Generator]:
    """Return a CPU generator for each seed. Refuse seeds of more bits than torch's generator reads there."""
    outside = [s for s in seeds if not 0 <= s < 2**32]
    if outside:
        raise DiffalignError(f"sample: seed {outside[0]} is outside 0..2**32-1; larger ones would repeat silently")
    return [torch.Generator().manual_seed(int(seed)) for seed in seeds]


def noise_record(scheduler: SchedulerMixin, family: str, shape: Sequence[int]) -> NoiseRecord:
    """Return what the provenance of an image says, which this scheduler draws from noise of this shape."""
    name = type(scheduler).__name__
    bad = [key for key, values in DETERMINISTIC.get(name, {}).items() if scheduler.config.get(key) in values]
    reason = ""
    if name not in DETERMINISTIC or bad:
        settings = "".join(f" with {key}={scheduler.config[key]}" for key in bad)
        reason = f"{name}{settings} draws noise in its steps"
    return {"exact": not reason, "family": family, "shape": list(shape), "sampler": name, "reason": reason}
