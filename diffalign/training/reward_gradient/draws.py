"""Everything random in a step of reward-gradient training, by name: micro-batches, processes and a resume do not change it.

Which of the sampler's steps carry a gradient belongs to the training step: it is the same for all its images, and so all
processes do the same work (ReFL's code draws it once a batch, too).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffalign.config import RewardGradientConfig
from diffalign.draws import draw, normal


@dataclass(frozen=True)
class Span:
    """The sampler's steps that carry a gradient: `first` to `stop`, counted from 0; the x0 of step `stop` is judged."""

    first: int
    stop: int

    @property
    def length(self) -> int:
        """How many steps carry a gradient."""
        return self.stop - self.first + 1


def late_steps(steps: int) -> tuple[int, int]:
    """Return the first and the last of a sampler's last quarter of steps: ReFL's 30 to 39 of 40."""
    return steps - max(1, steps // 4), steps - 1


def span_of(config: RewardGradientConfig, step: int) -> Span:
    """Draw the sampler's steps that training step `step` differentiates, by `config.method`."""
    method, steps = config.method, config.sampler.steps
    generator = draw(config.seed, "reward_gradient_span", step=step)
    if method.name == "refl":
        low, high = method.between or late_steps(steps)
        stop = int(generator.integers(low, high + 1))
        return Span(max(stop - method.depth + 1, 0), stop)
    if method.name == "draft":
        return Span(steps - (method.last or steps), steps - 1)
    if method.name == "alignprop":
        low, high = method.last or (1, steps)
        return Span(steps - int(generator.integers(low, high + 1)), steps - 1)
    return Span(steps - 1, steps - 1)  # draft_lv


@dataclass(frozen=True)
class GradientDraws:
    """What was drawn for N images.

    noise [N, C, h, w]: what the sampler starts from; renoise [N R, C, h, w]: for DRaFT-LV, R for each image, side by side.
    """

    noise: Tensor
    renoise: Tensor | None


def make_gradient_draws(
    config: RewardGradientConfig, step: int, slots: list[int], prompts: list[str], shape: tuple[int, ...]
) -> GradientDraws:
    """Draw for prompts with the ids `prompts` at positions `slots` of a step. shape: (C, h, w) of the latents."""
    again = config.method.noises if config.method.name == "draft_lv" else 0
    noise: list[np.ndarray] = []
    renoise: list[np.ndarray] = []
    for slot, prompt in zip(slots, prompts, strict=True):

        def one(stream: str, member: int | None = None, slot: int = slot, prompt: str = prompt) -> np.ndarray:
            generator = draw(config.seed, stream, step=step, inner=slot, group=prompt, member=member)
            return normal(generator, shape)

        noise.append(one("reward_gradient_noise"))
        renoise += [one("reward_gradient_renoise", member) for member in range(again)]
    return GradientDraws(torch.from_numpy(np.stack(noise)), torch.from_numpy(np.stack(renoise)) if renoise else None)
