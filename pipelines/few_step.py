"""Few-step samplers of a distilled student, and the diffusers scheduler that a student is saved with.

    renoise  x0 as predicted, noised again to the next time with fresh noise: LCMScheduler, FlowMatchLCMScheduler (DMD2)
    euler    deterministic: FlowMatchEulerDiscreteScheduler, or DDIM on its trailing grid
    cps      a' x0 + s' [cos(eta pi/2) e + sin(eta pi/2) z] (coefficients-preserving, RTDMD): eta 0 is euler, 1 is
             renoise; diffusers has no scheduler for what lies between

The scheduler's config holds the student's times, so that `num_inference_steps` alone brings them back: 999, 749, 499, 249 for
four steps of SDXL; 1, .9, .75, .5 for a flow of shift 3, the even grid with the family's shift applied once. diffusers' own
grid for a flow ends near 0 and shifts that end twice; a smaller shift with a terminal value draws the wanted grid:
for a shift k and n steps, shift k / (k - (1 - 1/n)(k - 1)) and the terminal k / (n + k - 1). Some pipelines hand their
scheduler an even grid down to 1 / n (FLUX, Qwen-Image, Z-Image): there the shift k alone draws the wanted one. A shift that
depends on the size of the image is kept at the one of the size that the student is made for. All of them start from unit
noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.pipelines.own_sampler import ddim_stops
from diffalign.pipelines.process import NoiseProcess
from diffalign.pipelines.schedulers import is_flow

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

Sampler = Literal["renoise", "euler", "cps"]
PLAIN_FLOW = {
    "stochastic_sampling": False, "invert_sigmas": False, "use_karras_sigmas": False, "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}  # fmt: skip
"""Settings of the base model's scheduler that a student does not take over: its steps and times are those of this file."""


@dataclass(frozen=True)
class FewStep:
    """A student's sampler. times [steps + 1] float32 in the process's units, noisiest first, `clean` last.

    stops [steps]: the times to whose noise levels a step of `euler` leads; None: the next of `times`.
    """

    process: NoiseProcess
    times: Tensor
    sampler: Sampler = "renoise"
    eta: float = 1.0
    stops: Tensor | None = None

    @property
    def steps(self) -> int:
        """The number of sampling steps."""
        return len(self.times) - 1

    @property
    def stochastic(self) -> bool:
        """Whether a step adds noise."""
        return self.sampler == "renoise" or (self.sampler == "cps" and self.eta > 0)

    def at(self, index: int, like: Tensor) -> Tensor:
        """Return times[index] for every latent of `like` [N, ...]: [N]."""
        return self.times[index].expand(len(like)).to(like.device)

    def transition(self, x: Tensor, prediction: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Return mean [N, C, h, w] and deviation rho [N] of x at times[index + 1], given x [N, C, h, w] at times[index].

        The last step returns x0 with rho = 0. Differentiable in x and the prediction.
        """
        t = self.at(index, x)
        x0, zero = self.process.x0(x, prediction, t), torch.zeros(len(x), device=x.device)
        if index == self.steps - 1:
            return x0, zero
        after = self.at(index + 1, x)
        if self.sampler == "euler":
            stop = after if self.stops is None else self.stops[index].expand(len(x)).to(x.device)
            return self.process.step(x, prediction, t, stop), zero
        a, s = self.process.coefficients(after)
        angle = (1.0 if self.sampler == "renoise" else self.eta) * math.pi / 2
        mean = a.view(-1, 1, 1, 1) * x0
        if self.sampler == "cps":
            mean = mean + (s * math.cos(angle)).view(-1, 1, 1, 1) * self.process.epsilon(x, prediction, t)
        return mean, s * math.sin(angle)

    def advance(self, x: Tensor, prediction: Tensor, index: int, noise: Tensor | None) -> Tensor:
        """Step to x at times[index + 1]; `noise` is unit noise, None where the sampler takes none."""
        mean, rho = self.transition(x, prediction, index)
        return mean if noise is None else mean + rho.view(-1, 1, 1, 1) * noise.float()


def student_scheduler(
    scheduler: SchedulerMixin,
    steps: int,
    sampler: Sampler,
    times: list[float] | None = None,
    *,
    shift: float | None = None,
    even: bool = False,
) -> SchedulerMixin:
    """Build the diffusers scheduler of a student from the base model's: its config decides the student's times.

    With explicit `times` the pipeline must be given them (`call_options`). shift: of a flow at the student's size; None: the
    scheduler's. even: whether the pipeline hands it an even grid. Raises DiffalignError for times out of order.
    """
    import diffusers

    config = scheduler.config
    if times is not None and (len(times) != steps or any(a <= b for a, b in pairwise(times))):
        raise DiffalignError(f"student.times: {steps} falling times are needed, not {times}")
    if is_flow(scheduler):
        shift = float(config.shift) if shift is None else shift
        options: dict[str, Any] = {
            "shift": shift,
            "shift_terminal": None,
            "use_dynamic_shifting": False,
            **PLAIN_FLOW,
        }
        if times is not None:
            options["shift"] = 1.0
        elif steps > 1 and not even:
            options["shift"] = shift / (shift - (1.0 - 1.0 / steps) * (shift - 1.0))
            options["shift_terminal"] = shift / (steps + shift - 1.0)
        kind = diffusers.FlowMatchLCMScheduler if sampler == "renoise" else diffusers.FlowMatchEulerDiscreteScheduler
        return kind.from_config(config, **options)
    if sampler == "euler":
        options = {
            "timestep_spacing": "trailing",
            "set_alpha_to_one": True,
            "clip_sample": False,
            "thresholding": False,
        }
        return diffusers.DDIMScheduler.from_config(config, **options)
    # With as many original steps as steps, LCM's grid is trailing, and any larger number of steps is refused.
    return diffusers.LCMScheduler.from_config(
        config, original_inference_steps=steps, clip_sample=False, thresholding=False
    )


def call_options(scheduler: SchedulerMixin, times: list[float] | None) -> dict[str, object]:
    """Return what a pipeline's call needs besides the number of steps: nothing, unless the times were given one by one."""
    if times is None:
        return {}
    if "FlowMatch" in type(scheduler).__name__:
        return {"sigmas": times}
    return {"timesteps": [int(t) for t in times]}


def few_step(
    process: NoiseProcess,
    scheduler: SchedulerMixin,
    steps: int,
    sampler: Sampler,
    eta: float,
    times: list[float] | None,
    sigmas: list[float] | None = None,
) -> FewStep:
    """Build the sampler that training rolls out, on the times that `scheduler` (of `student_scheduler`) visits.

    sigmas: the grid that the pipeline hands it; None: the number of steps.
    """
    if times is not None:
        grid = torch.tensor(times, dtype=torch.float32)
    elif process.span == 1.0:
        scheduler.set_timesteps(**({"num_inference_steps": steps} if sigmas is None else {"sigmas": sigmas}))
        grid = scheduler.sigmas[:steps].float()
    else:
        scheduler.set_timesteps(steps)
        grid = scheduler.timesteps.float()
    ddim = sampler == "euler" and process.span != 1.0
    stops = ddim_stops(grid.cpu(), int(process.span), process.clean) if ddim else None
    return FewStep(process, torch.cat([grid.cpu(), torch.tensor([process.clean])]), sampler, eta, stops)
