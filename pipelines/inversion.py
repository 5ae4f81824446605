"""Inversion: the noise from which a model's own sampler would draw a given image.

ReNoise (Garibi et al., arXiv 2403.14602). One inversion step looks for the latent z at t_next from which a sampling
step leads back to x at t. It is a fixed point: the step needs the prediction at z itself. Iterate from z = x, always
restarting the step from x and always giving the model the destination's time:

    z <- invert_step(x, model(z, t_next))

Without iterations that is DDIM inversion; k of them cost k more forward passes a step. The mean of the iterates is the
mean of their predictions, since a step is affine in the prediction.

SmPO-Diffusion (Lu et al., arXiv 2506.02698) trains at the latent so found instead of at a randomly noised one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.pipelines.process import Diffusion, NoiseProcess

Predict = Callable[[Tensor, Tensor], Tensor]
"""(noisy [n, C, h, w], t [n]) -> the network's native prediction."""
PredictRows = Callable[[Tensor, Tensor, Tensor], Tensor]
"""The same with the rows [n] of the batch that these are, for their captions."""


def renoise_step(
    process: NoiseProcess,
    predict: Predict,
    x: Tensor,
    t: Tensor,
    t_next: Tensor,
    *,
    iterations: int = 1,
    average_from: int = 0,
    predict_at: Tensor | None = None,
) -> Tensor:
    """Invert one step: x [n, C, h, w] at times t [n] to its latent at the noisier t_next, float32.

    `iterations` + 1 forward passes. The iterates from number `average_from` on are averaged; 0: all of them, `iterations`:
    the last alone. predict_at [n]: the time that the network is given; None: t_next.
    """
    at = t_next if predict_at is None else predict_at
    z, total = x, torch.zeros_like(x, dtype=torch.float32)
    for k in range(iterations + 1):
        z = process.invert_step(x, predict(z, at), t, t_next, predicted_at=(z, at))
        if k >= average_from:
            total = total + z
    return total / (iterations + 1 - average_from)


@dataclass(frozen=True)
class Route:
    """Inversion steps of B samples.

    counts [B]: sample i takes the first counts[i] steps. start, predict_at, stop [B, steps]: step k goes from its start to
    its stop, and the network is given the time predict_at.
    """

    counts: Tensor
    start: Tensor
    predict_at: Tensor
    stop: Tensor


def consistent_route(process: NoiseProcess, t: Tensor, steps: int) -> Route:
    """Return max(1, ceil(steps t / span)) equal steps from the image to exactly t [B], each predicted at its stop."""
    share = steps * t.double() / process.span
    counts = (share - 1e-6).ceil().clamp_min(1).long()  # 5 x 0.2 in float32 is a little more than 1
    k = torch.arange(int(counts.max()), device=t.device)
    stop = t[:, None] * ((k + 1) / counts[:, None]).clamp(max=1.0)
    start = torch.cat([torch.full_like(stop[:, :1], process.noiseless), stop[:, :-1]], dim=1)
    return Route(counts, start, stop, stop)


def official_route(process: NoiseProcess, t: Tensor, steps: int) -> Route:
    """Return the grid of SmPO's code with the scheduler of diffusers 0.20: -199, 1, 201, 401, 601 for five steps.

    Its quirks, all kept: the last step stops at a grid level at or above t (at 801 if t is above that), while the loss
    takes it for t; the network is given the time where a step starts, not where it goes; the first is negative. (A fourth,
    abar rounded to float16, is not kept.) Raises DiffalignError for processes other than epsilon diffusion.
    """
    if not isinstance(process, Diffusion) or process.prediction_type != "epsilon":
        raise DiffalignError(
            f"inversion.mode=official: it repeats code for epsilon models, and this one predicts "
            f"{process.prediction_type}; use inversion.mode=consistent"
        )
    ratio = process.timesteps // steps
    starts = (torch.arange(steps, device=t.device) - 1.0) * ratio + 1.0
    counts = (starts < t[:, None]).sum(1)
    rows = starts.expand(len(t), -1)
    return Route(counts, rows.clamp_min(0.0), rows, rows + ratio)


ROUTES = {"consistent": consistent_route, "official": official_route}


def inverted_noise(
    process: NoiseProcess,
    predict: PredictRows,
    x0: Tensor,
    t: Tensor,
    *,
    steps: int,
    iterations: int = 1,
    average_from: int = 0,
    mode: str = "consistent",
) -> Tensor:
    """Return the noise, [B, C, h, w] float32, that makes x_t = a(t) x0 + s(t) noise the inverted latent of x0 at t [B].

    So `add_noise` gives that latent, and `target` SmPO's target: (x_t - a x0) / s for epsilon, (x_t - x0) / t for a
    flow. `steps` lead from an image to pure noise, fewer to an earlier time. Each forward pass takes the samples that
    have steps left. It keeps a graph unless wrapped in `torch.no_grad()`.
    """
    if mode not in ROUTES:
        raise DiffalignError(f"inversion.mode: unknown mode '{mode}'; choose one of {', '.join(ROUTES)}")
    route = ROUTES[mode](process, t, steps)
    x = x0.float().clone()
    for k in range(int(route.counts.max())):
        rows = (route.counts > k).nonzero().squeeze(1)

        def here(noisy: Tensor, time: Tensor, rows: Tensor = rows) -> Tensor:
            return predict(noisy, time, rows)

        x[rows] = renoise_step(
            process,
            here,
            x[rows],
            route.start[rows, k],
            route.stop[rows, k],
            iterations=iterations,
            average_from=average_from,
            predict_at=route.predict_at[rows, k],
        )
    a, s = (c.view(-1, *[1] * (x.dim() - 1)) for c in process.coefficients(t))
    return (x - a * x0.float()) / s
