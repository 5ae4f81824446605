"""The sampler that a pipeline has: whether training can unroll it, and the exact steps that it takes.

A reward's gradient goes through the steps of sampling, so they must be the pipeline's own: the times at which the network
is asked, and the noise levels that each step leads to. They are read from the scheduler itself. `NoiseProcess.step` repeats
a step of DDIM and of Euler; whatever else a scheduler does is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.pipelines.process import NoiseProcess
from diffalign.pipelines.schedulers import is_flow

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

# Settings under which a step is another one than `NoiseProcess.step`, by the scheduler's class: key -> the value needed.
NEEDED: dict[str, dict[str, object]] = {
    "DDIMScheduler": {"clip_sample": False, "thresholding": False},
    "EulerDiscreteScheduler": {
        "final_sigmas_type": "zero",
        "interpolation_type": "linear",
        "timestep_type": "discrete",
        "sigma_min": None,
        "sigma_max": None,
    },
    "FlowMatchEulerDiscreteScheduler": {"stochastic_sampling": False, "invert_sigmas": False},
}
SHORT_NAMES = {
    "DDIMScheduler": "ddim",
    "EulerDiscreteScheduler": "euler",
    "FlowMatchEulerDiscreteScheduler": "flow_euler",
}


@dataclass(frozen=True)
class SamplerSteps:
    """The steps of a sampler: times [n] float32 at which the network is asked, noisiest first, and stops [n], the times to
    whose noise levels they lead; `clean` last."""

    times: Tensor
    stops: Tensor


def reason_not_followed(scheduler: SchedulerMixin) -> str | None:
    """Return why training cannot unroll this scheduler, and what to set; None where it can."""
    name = type(scheduler).__name__
    followed = name in NEEDED
    other = "FlowMatchEulerDiscreteScheduler" if is_flow(scheduler) else "DDIMScheduler"
    target = name if followed else other
    wrong = {key: value for key, value in NEEDED[target].items() if scheduler.config.get(key, value) != value}
    if followed and not wrong:
        return None
    wanted = SHORT_NAMES[target]
    if wrong:
        options = ", ".join(f"{key}: {'null' if value is None else str(value).lower()}" for key, value in wrong.items())
        wanted = f"{{name: {wanted}, options: {{{options}}}}}"
    found = ", ".join(f"{key}={scheduler.config[key]}" for key in wrong)
    why = f"{name} has {found}" if followed else f"{name} draws noise in its steps, or uses several predictions for one"
    return f"{why}, which a step with a gradient does not repeat; set sampler.scheduler={wanted}"


def sampler_steps(scheduler: SchedulerMixin, process: NoiseProcess, steps: int, **arguments: object) -> SamplerSteps:
    """Return the steps that a pipeline with this scheduler takes.

    arguments: what the pipeline passes to `set_timesteps` besides the number of steps. Raises DiffalignError for a scheduler
    that cannot be followed, and for a number of steps that it cannot take.
    """
    if reason := reason_not_followed(scheduler):
        raise DiffalignError(f"scheduler: {reason}")
    process.schedule(steps)  # refuses numbers of steps that the model cannot take
    own: Any = type(scheduler).from_config(scheduler.config)  # a copy: the pipeline's has a state
    own.set_timesteps(**({} if "sigmas" in arguments else {"num_inference_steps": steps}), **arguments)
    clean = torch.tensor([process.clean])
    if process.span == 1.0:
        times = own.sigmas[:-1].float().cpu()
        return SamplerSteps(times, torch.cat([times[1:], clean]))
    times = own.timesteps.float().cpu()
    if type(own).__name__ == "DDIMScheduler":
        return SamplerSteps(times, ddim_stops(times, int(process.span), process.clean))
    return SamplerSteps(times, torch.cat([times[1:], clean]))


def ddim_stops(times: Tensor, timesteps: int, clean: float) -> Tensor:
    """Return the times [n] that DDIM's steps of diffusers lead to: each as far on as the whole part of T / n.

    With T not divisible by n, or with timestep_spacing linspace, these are not quite the next times.
    """
    stops = times - timesteps // len(times)
    return torch.where(stops < 0, torch.full_like(stops, clean), stops)
