"""Samplers by short names, to replace the one that a pipeline ships with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from diffalign.errors import DiffalignError, brief

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin


def is_flow(scheduler: SchedulerMixin) -> bool:
    """Return whether a scheduler is that of a rectified flow: FlowMatch by name, or a solver that predicts a flow."""
    return "FlowMatch" in type(scheduler).__name__ or scheduler.config.get("prediction_type") == "flow_prediction"


def replace_scheduler(pipeline: DiffusionPipeline, name: str, options: Mapping[str, object]) -> None:
    """Give a diffusers pipeline another sampler with the settings of the one it has; `options` replace some of them.

    A rectified-flow model takes flow_euler or flow_heun and others do not: the wrong kind would draw noise without an
    error, so it is refused (DiffalignError).
    """
    import diffusers

    classes = {
        "ddim": diffusers.DDIMScheduler,
        "ddpm": diffusers.DDPMScheduler,
        "dpmpp": diffusers.DPMSolverMultistepScheduler,
        "euler": diffusers.EulerDiscreteScheduler,
        "euler_ancestral": diffusers.EulerAncestralDiscreteScheduler,
        "flow_euler": diffusers.FlowMatchEulerDiscreteScheduler,
        "flow_heun": diffusers.FlowMatchHeunDiscreteScheduler,
        "heun": diffusers.HeunDiscreteScheduler,
        "unipc": diffusers.UniPCMultistepScheduler,
    }
    if name not in classes:
        raise DiffalignError(f"scheduler.name {name}: unknown; there are {', '.join(classes)}")
    before = pipeline.scheduler
    flow = is_flow(before)
    if flow != name.startswith("flow_"):
        kind = "a rectified-flow model" if flow else "a diffusion model"
        fitting = [n for n in classes if n.startswith("flow_") == flow]
        raise DiffalignError(f"scheduler.name {name}: this is {kind}; use {', '.join(fitting)}")
    known = set(classes[name]().config)
    wrong = sorted(set(options) - known)
    if wrong:
        raise DiffalignError(f"scheduler.options: {name} has no {wrong[0]}; it has {', '.join(sorted(known))}")
    # diffusers' default for some clips an image's pixels to [-1, 1]; latents lie far outside.
    unclipped = {"clip_sample": before.config.get("clip_sample", False)} if "clip_sample" in known else {}
    # A solver's config calls the shift of a flow flow_shift.
    shift = {"shift": before.config.flow_shift} if flow and "flow_shift" in before.config else {}
    try:
        pipeline.scheduler = classes[name].from_config(before.config, **{**unclipped, **shift, **options})
    except (ValueError, TypeError, ImportError) as error:
        raise DiffalignError(f"scheduler {name}: {brief(error)}") from error
