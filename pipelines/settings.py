"""How images are sampled, apart from prompts and seeds; readable without torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypedDict


@dataclass(frozen=True)
class SamplingSettings:
    """What `Backbone.sample` and `Generator.draw` take besides prompts and seeds.

    steps: sampling steps. guidance_scale: classifier-free guidance, or the scale that a guided network takes as an input.
    negative_prompt: what to steer away from. height, width: in pixels; None: the model's own.
    """

    steps: int
    guidance_scale: float
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None


class SamplingKeywords(TypedDict, total=False):
    """The fields of `SamplingSettings` given one by one."""

    steps: int
    guidance_scale: float
    negative_prompt: str | None
    height: int | None
    width: int | None


def merged(settings: SamplingSettings | None, single: SamplingKeywords) -> SamplingSettings:
    """Return `settings` with the fields in `single` replaced; without settings, `single` must name steps and scale."""
    return SamplingSettings(**single) if settings is None else replace(settings, **single)


class ScheduleArguments(TypedDict, total=False):
    """What a pipeline passes to its scheduler's `set_timesteps` besides the number of steps."""

    sigmas: list[float]
    mu: float
