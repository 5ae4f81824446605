"""Noise processes: everything that differs between epsilon, v and flow models, in one interface.

A process writes a noisy latent as x_t = a(t) x0 + s(t) noise.
  Diffusion  a = sqrt(abar_t), s = sqrt(1 - abar_t); t is a timestep 0..T-1; the network predicts epsilon or
             v = a noise - s x0 (Salimans & Ho 2022, "Progressive Distillation").
  Flow       a = 1 - t, s = t; t in (0, 1], t = 1 is noise; the network predicts u = noise - x0 (Liu et al. 2022,
             "Flow Straight and Fast"; Esser et al. 2024, "Scaling Rectified Flow Transformers").
Shapes: latents [B, C, h, w] float32; times [B] float32. All functions are differentiable in the latents and the
prediction, and compute in float32 whatever dtype comes in: bf16 latents lose 0.03 when noise is added to them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.pipelines.sde import flow_sde_step, posterior_step

ERROR_SPACES = ("native", "epsilon", "x0")
TIME_SAMPLERS = ("uniform", "logit_normal", "schedule")


def _like(values: Tensor, latents: Tensor) -> Tensor:
    """Reshape [B] to [B, 1, 1, 1] on the latents' device, so that it multiplies [B, C, h, w]."""
    return values.to(latents.device, torch.float32).reshape(-1, *([1] * (latents.dim() - 1)))


class NoiseProcess(ABC):
    """What trainers and samplers know about a model's noise. See the module docstring for symbols and shapes."""

    prediction_type: str
    clean: float
    """The time that `schedule` puts last: there the latent holds no (or next to no) noise."""
    noiseless: float
    """The time of an image without any noise; some diffusion schedulers stop short of it, at timestep 0's level."""
    span: float
    """Length of the time axis from image to noise: the number of timesteps, or 1."""
    shift: float = 1.0
    """By how much the model's own schedule is moved towards noise (`draw_times`)."""

    # --- what a subclass defines -------------------------------------------------------------------------------

    @abstractmethod
    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return a(t) and s(t), each [B] float32 on t's device."""

    @abstractmethod
    def model_time(self, t: Tensor) -> Tensor:
        """Return what the network takes as its time input, [B] float32."""

    @abstractmethod
    def schedule(self, steps: int) -> Tensor:
        """Return the times that the diffusers pipeline visits: [steps + 1] float32, noisiest first, `clean` last."""

    @abstractmethod
    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return what a perfect network would predict, [B, C, h, w] float32."""

    @abstractmethod
    def x0(self, x_t: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """Return the clean latent that a prediction implies, [B, C, h, w] float32."""

    @abstractmethod
    def epsilon(self, x_t: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """Return the noise that a prediction implies, [B, C, h, w] float32."""

    @abstractmethod
    def error_scale(self, t: Tensor, space: str = "native") -> Tensor:
        """Return the factor [B] from a squared error of the native prediction to one of epsilon or x0 at the same x_t."""

    @abstractmethod
    def _time_of(self, fraction: Tensor) -> Tensor:
        """Turn fractions [B] float64 in (0, 1) into times [B] float32."""

    def initial(self, noise: Tensor) -> Tensor:
        """Turn unit noise into the latent at `schedule(steps)[0]`, as the diffusers pipeline starts."""
        return noise.float()

    # --- what follows from it ----------------------------------------------------------------------------------

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return x_t = a(t) x0 + s(t) noise."""
        a, s = self.coefficients(t)
        return _like(a, x0) * x0.float() + _like(s, x0) * noise.float()

    def draw_times(
        self,
        u: Tensor,
        sampler: str = "uniform",
        mean: float = 0.0,
        std: float = 1.0,
        shift: float = 1.0,
        steps: int | None = None,
        skip: int = 0,
    ) -> Tensor:
        """Turn uniform draws u [B] float64 in (0, 1) into times [B] float32; larger u is noisier.

        `logit_normal`: sigmoid(mean + std z) with z normal (Esser et al. 2024, eq. 19). `shift` > 1 moves them towards
        noise: t -> shift t / (1 + (shift - 1) t) (their eq. 23). `schedule`: one of the times of `schedule(steps)` at which
        the network is asked, all alike, without the `skip` noisiest. Raises DiffalignError for an unknown sampler, and for a
        number of steps that the model cannot take.
        """
        fraction = u.to(torch.float64).clamp(2.0**-53, 1.0 - 2.0**-53)
        if sampler == "schedule":
            visited = self.schedule(steps or 1)[skip:-1].flip(0)
            return visited[(fraction * len(visited)).long().to(visited.device)]
        if sampler == "logit_normal":
            fraction = torch.sigmoid(mean + std * torch.special.ndtri(fraction))
        elif sampler != "uniform":
            raise DiffalignError(
                f"times.sampler: unknown sampler '{sampler}'; choose one of {', '.join(TIME_SAMPLERS)}"
            )
        return self._time_of(shift * fraction / (1.0 + (shift - 1.0) * fraction))

    @abstractmethod
    def step(self, x: Tensor, prediction: Tensor, t: Tensor, t_next: Tensor, noise: Tensor | None = None) -> Tensor:
        """Take one sampling step from time t to the less noisy t_next, [B, C, h, w] float32.

        Without `noise` it is deterministic: DDIM (Song et al. 2021, eq. 12, eta = 0) or Euler on the flow. With unit
        `noise` it is ancestral: DDIM with eta = 1, or, for a flow, x0 noised again to t_next.
        """

    @abstractmethod
    def sde_step(self, x: Tensor, prediction: Tensor, t: Tensor, t_next: Tensor, level: float) -> tuple[Tensor, Tensor]:
        """Return mean [B, C, h, w] and deviation [B, 1, 1, 1] of a stochastic step; the mean is linear in the prediction.

        level: of the noise, 0 for none. See `sde.py`.
        """

    def invert_step(
        self,
        x: Tensor,
        prediction: Tensor,
        t: Tensor,
        t_next: Tensor,
        predicted_at: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Take the deterministic step towards more noise: x at time t goes to t_next > t. `t` may be `clean` or `noiseless`.

        predicted_at: the latent and the time at which the prediction was made, where these are not (x, t): what a sampler
        holds constant over a step (epsilon, or a flow's velocity) is read off there.
        """
        return self.step(x, prediction, t, t_next)

    def invertible_times(self, t: Tensor, steps: int) -> Tensor:
        """Return the times [B] nearest to t at which inversion in `steps` steps determines the noise: here, t itself."""
        return t


class Diffusion(NoiseProcess):
    """Variance-preserving diffusion with discrete timesteps, for epsilon and v prediction.

    alphas_cumprod [T] is abar; `final_alpha_cumprod` is abar at `clean` (-1): 1, or abar_0 for schedulers with
    `set_alpha_to_one: false`. `spacing`, `offset` and `scaled_start` say how the pipeline's scheduler lays out its
    timesteps; `log_sigmas`, that between two of them log(s/a) is interpolated, as with Karras's sigmas, and not s/a.
    Raises DiffalignError for other prediction types, and for epsilon with zero terminal SNR: at abar = 0 epsilon says
    nothing about x0 (Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed").
    """

    clean = -1.0
    noiseless = float("-inf")

    def __init__(
        self,
        alphas_cumprod: Tensor,
        prediction_type: str,
        *,
        spacing: str = "leading",
        offset: int = 0,
        final_alpha_cumprod: float = 1.0,
        scaled_start: bool = False,
        zero_snr: bool = False,
        log_sigmas: bool = False,
    ) -> None:
        if prediction_type not in ("epsilon", "v_prediction"):
            raise DiffalignError(
                f"scheduler: prediction_type '{prediction_type}' is not supported; it must be epsilon or v_prediction"
            )
        self.alphas_cumprod = alphas_cumprod.detach().to("cpu", torch.float32)
        # Euler schedulers store 2^-24 instead of 0.
        if prediction_type == "epsilon" and (zero_snr or float(self.alphas_cumprod[-1]) < 1e-7):
            raise DiffalignError(
                "scheduler: zero terminal SNR (rescale_betas_zero_snr) cannot go with prediction_type epsilon; "
                "use a v_prediction model or set rescale_betas_zero_snr to false in scheduler_config.json"
            )
        if spacing not in ("leading", "trailing", "linspace"):
            raise DiffalignError(f"scheduler: timestep_spacing '{spacing}' is not supported")
        self.prediction_type = prediction_type
        self.spacing = spacing
        self.offset = offset
        self.final_alpha_cumprod = final_alpha_cumprod
        self.scaled_start = scaled_start
        self.timesteps = len(self.alphas_cumprod)
        self.span = float(self.timesteps)
        self.log_sigmas = log_sigmas
        # Schedules may visit fractional timesteps (Euler with linspace); there s/a is interpolated, as Euler does.
        sigmas = ((1.0 - self.alphas_cumprod.double()) / self.alphas_cumprod.double()).sqrt()
        self._tables = {torch.device("cpu"): (self.alphas_cumprod, sigmas)}

    def _table(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return abar and sigma [T] on a device; kept, so that a step on a GPU needs no transfer."""
        if device not in self._tables:
            abar, sigmas = self._tables[torch.device("cpu")]
            self._tables[device] = abar.to(device), sigmas.to(device)
        return self._tables[device]

    def alpha_cumprod(self, t: Tensor) -> Tensor:
        """Return abar [B] float32 at timesteps t [B]; 1 at `noiseless`, and `final_alpha_cumprod` at others below 0."""
        abar, sigmas = self._table(t.device)
        times = t.detach().to(torch.float64)
        low = times.floor().clamp(0, self.timesteps - 1).long()
        high = (low + 1).clamp(max=self.timesteps - 1)
        part = (times - low).clamp(0.0, 1.0)
        # Where part is 0 the interpolated value is not used: with zero terminal SNR the next sigma is infinite.
        if self.log_sigmas:
            sigma = (sigmas[low].log() * (1 - part) + sigmas[high].log() * part).exp()
        else:
            sigma = sigmas[low] * (1 - part) + sigmas[high] * part
        value = torch.where(part > 0, (1.0 / (1.0 + sigma * sigma)).float(), abar[low])
        value = torch.where(times < 0, torch.full_like(value, self.final_alpha_cumprod), value)
        return torch.where(times.isneginf(), torch.ones_like(value), value)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        abar = self.alpha_cumprod(t)
        return abar.sqrt(), (1.0 - abar).sqrt()

    def model_time(self, t: Tensor) -> Tensor:
        return t.float()

    def initial(self, noise: Tensor) -> Tensor:
        if not self.scaled_start:
            return noise.float()
        # Euler with linspace or trailing starts from sigma_max noise; in this parametrisation that is s(T - 1) noise.
        return (1.0 - self.alphas_cumprod[-1]).sqrt().to(noise.device) * noise.float()

    def schedule(self, steps: int) -> Tensor:
        total = self.timesteps
        if not 1 <= steps <= total:
            raise DiffalignError(f"steps: {steps} sampling steps asked for; this model allows 1 to {total}")
        if self.spacing == "leading":
            times = torch.arange(steps).flip(0) * (total // steps) + self.offset
        elif self.spacing == "trailing":
            times = torch.round(torch.tensor([total - i * (total / steps) for i in range(steps)])) - 1
        else:
            times = torch.linspace(0, total - 1, steps, dtype=torch.float64).flip(0)
        return torch.cat([times.float(), torch.tensor([self.clean])])

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        if self.prediction_type == "epsilon":
            return noise.float()
        a, s = self.coefficients(t)
        return _like(a, x0) * noise.float() - _like(s, x0) * x0.float()

    def x0(self, x_t: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        a, s = (_like(c, x_t) for c in self.coefficients(t))
        if self.prediction_type == "epsilon":
            return (x_t.float() - s * prediction.float()) / a
        return a * x_t.float() - s * prediction.float()

    def epsilon(self, x_t: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        if self.prediction_type == "epsilon":
            return prediction.float()
        a, s = (_like(c, x_t) for c in self.coefficients(t))
        return s * x_t.float() + a * prediction.float()

    def error_scale(self, t: Tensor, space: str = "native") -> Tensor:
        abar = self.alpha_cumprod(t)
        if space == "native":
            return torch.ones_like(abar)
        if space == "epsilon":
            return torch.ones_like(abar) if self.prediction_type == "epsilon" else abar
        if space == "x0":
            return (1.0 - abar) / abar if self.prediction_type == "epsilon" else 1.0 - abar
        raise _unknown_space(space)

    def step(self, x: Tensor, prediction: Tensor, t: Tensor, t_next: Tensor, noise: Tensor | None = None) -> Tensor:
        if noise is None:
            a, s = self.coefficients(t_next)
            return _like(a, x) * self.x0(x, prediction, t) + _like(s, x) * self.epsilon(x, prediction, t)
        mean, deviation = self.sde_step(x, prediction, t, t_next, 1.0)
        return mean + deviation * noise.float()

    def sde_step(self, x: Tensor, prediction: Tensor, t: Tensor, t_next: Tensor, level: float) -> tuple[Tensor, Tensor]:
        now, then = (_like(self.alpha_cumprod(time), x) for time in (t, t_next))
        return posterior_step(self.x0(x, prediction, t), self.epsilon(x, prediction, t), now, then, level)

    def invert_step(
        self,
        x: Tensor,
        prediction: Tensor,
        t: Tensor,
        t_next: Tensor,
        predicted_at: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        latent, time = predicted_at or (x, t)
        epsilon = self.epsilon(latent, prediction, time)
        (a, s), (a_next, s_next) = self.coefficients(t), self.coefficients(t_next)
        x0 = (x.float() - _like(s, x) * epsilon) / _like(a, x)
        return _like(a_next, x) * x0 + _like(s_next, x) * epsilon

    def _time_of(self, fraction: Tensor) -> Tensor:
        return (fraction * self.timesteps).floor().clamp(0, self.timesteps - 1).float()


class Flow(NoiseProcess):
    """Rectified flow with the network's time in units of 1/`timesteps`, as FlowMatchEulerDiscreteScheduler has it.

    `shift` is the scheduler's and concerns sampling only; training times are shifted by `draw_times`.
    `shift_terminal` stretches the sampling times so that the last one before clean has this value.
    """

    clean = 0.0
    noiseless = 0.0
    span = 1.0
    prediction_type = "flow"

    def __init__(self, shift: float = 1.0, *, timesteps: int = 1000, shift_terminal: float | None = None) -> None:
        if shift <= 0 or not math.isfinite(shift):
            raise DiffalignError(f"scheduler: shift must be a positive number, not {shift}")
        self.shift = shift
        self.timesteps = timesteps
        self.shift_terminal = shift_terminal

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1.0 - t.float(), t.float()

    def model_time(self, t: Tensor) -> Tensor:
        return t.float() * self.timesteps

    def _shifted(self, t: Tensor) -> Tensor:
        return self.shift * t / (1.0 + (self.shift - 1.0) * t)

    def schedule(self, steps: int) -> Tensor:
        if steps < 1:
            raise DiffalignError(f"steps: {steps} sampling steps asked for; at least 1 is needed")
        # diffusers shifts twice: its smallest time is already shifted, and the grid down to it is shifted again.
        smallest = self._shifted(torch.tensor(1.0 / self.timesteps, dtype=torch.float64)).float().double()
        times = self._shifted(torch.linspace(1.0, float(smallest), steps, dtype=torch.float64))
        if self.shift_terminal:
            times = 1.0 - (1.0 - times) * (1.0 - self.shift_terminal) / (1.0 - times[-1])
        return torch.cat([times.float(), torch.tensor([self.clean])])

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise.float() - x0.float()

    def x0(self, x_t: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        return x_t.float() - _like(t, x_t) * prediction.float()

    def epsilon(self, x_t: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        return x_t.float() + _like(1.0 - t.float(), x_t) * prediction.float()

    def error_scale(self, t: Tensor, space: str = "native") -> Tensor:
        time = t.float()
        if space == "native":
            return torch.ones_like(time)
        if space == "epsilon":
            return (1.0 - time) ** 2
        if space == "x0":
            return time**2
        raise _unknown_space(space)

    def step(self, x: Tensor, prediction: Tensor, t: Tensor, t_next: Tensor, noise: Tensor | None = None) -> Tensor:
        if noise is None:
            return x.float() + _like(t_next.float() - t.float(), x) * prediction.float()
        return self.add_noise(self.x0(x, prediction, t), noise, t_next)

    def sde_step(self, x: Tensor, prediction: Tensor, t: Tensor, t_next: Tensor, level: float) -> tuple[Tensor, Tensor]:
        return flow_sde_step(x.float(), prediction.float(), _like(t, x), _like(t_next, x), level)

    def invertible_times(self, t: Tensor, steps: int) -> Tensor:
        # The velocity is (x_t - x0) / t: nearer to the image than one step it would be rounding error.
        return t.clamp_min(1.0 / steps)

    def _time_of(self, fraction: Tensor) -> Tensor:
        # float32 could round the smallest draws to 0, where epsilon is undefined in some methods.
        return fraction.float().clamp_min(torch.finfo(torch.float32).tiny)


def _unknown_space(space: str) -> DiffalignError:
    return DiffalignError(f"error_space: unknown space '{space}'; choose one of {', '.join(ERROR_SPACES)}")
