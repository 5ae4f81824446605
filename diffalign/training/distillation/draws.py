"""Everything random in distillation, by name: neither micro-batches nor processes nor a resume can change it.

An iteration is one roll-out of the student and one update of the fake network; they are numbered over a whole run, since a
step has several. What belongs to the iteration leaves out the group: the step at which the student stops is the same in
all processes (and so is the work they do).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffalign.config import DistillConfig
from diffalign.draws import draw, normal
from diffalign.pipelines.few_step import FewStep


@dataclass(frozen=True)
class DistillDraws:
    """What was drawn for a micro-batch of B prompts with M images each, N = B M; a prompt's images are side by side.

    stop: the student's step that learns. noise [N, steps, C, h, w]: the start, then what each transition takes.
    times [N R], renoise [N R, C, h, w]: where teacher and fake are compared, R re-noisings of an image side by side.
    guidance_times, guidance_noise: the same for the guidance's part where it is decoupled. fake_times [N], fake_noise [N,
    C, h, w]: where the fake network learns.
    """

    stop: int
    noise: Tensor
    times: Tensor
    renoise: Tensor
    guidance_times: Tensor
    guidance_noise: Tensor
    fake_times: Tensor
    fake_noise: Tensor


def stacked(arrays: list[np.ndarray]) -> Tensor:
    """Return the arrays as one tensor, [len(arrays), ...]."""
    return torch.from_numpy(np.stack(arrays))


def uniform(values: list[float]) -> Tensor:
    """Return uniform draws as `NoiseProcess.draw_times` takes them."""
    return torch.tensor(values, dtype=torch.float64)


def group_shape(config: DistillConfig) -> tuple[int, int]:
    """Return how many images a prompt has, and how many re-noisings an image."""
    group = config.group
    return {"none": (1, 1), "prompt": (group.size, 1), "renoise": (1, group.size)}[group.axis]


def stop_step(config: DistillConfig, iteration: int) -> int:
    """Draw which of the student's steps an iteration trains: uniformly, the same for all prompts (DMD2)."""
    return int(draw(config.seed, "distill_stop", step=iteration).integers(config.student.steps))


def make_distill_draws(
    config: DistillConfig,
    student: FewStep,
    iteration: int,
    slots: list[int],
    prompts: list[str],
    shape: tuple[int, ...],
) -> DistillDraws:
    """Draw for prompts with the ids `prompts` at positions `slots` of an iteration. shape: (C, h, w) of the latents."""
    images, renoisings = group_shape(config)
    process, stop = student.process, stop_step(config, iteration)
    noises = student.steps if student.stochastic else 1
    noise, renoise, level, guidance_noise, guidance_level, fake_noise, fake_level = ([] for _ in range(7))

    for slot, prompt in zip(slots, prompts, strict=True):

        def one(stream: str, member: int | None = None, slot: int = slot, prompt: str = prompt) -> np.random.Generator:
            return draw(config.seed, stream, step=iteration, inner=slot, group=prompt, member=member)

        for image in range(images):
            noise.append(normal(one("distill_noise", image), (noises, *shape)))
            fake_noise.append(normal(one("distill_fake_noise", image), shape))
            fake_level.append(one("distill_fake_time", image).random())
            for again in range(renoisings):
                member = image * renoisings + again
                # Images of one prompt share the level, else a group would measure the level; re-noisings do not.
                shared = None if renoisings == 1 else member
                renoise.append(normal(one("distill_renoise", member), shape))
                level.append(one("distill_time", shared).random())
                guidance_noise.append(normal(one("distill_guidance_noise", member), shape))
                guidance_level.append(one("distill_guidance_time", shared).random())

    match = config.match
    shift = process.shift if match.shift is None else match.shift
    between = match.low + (match.high - match.low) * uniform(level)
    # Decoupled DMD: the guidance acts below the level that the student's step starts from.
    below = uniform(guidance_level) * float(student.times[stop]) / process.span
    return DistillDraws(
        stop,
        stacked(noise),
        process.draw_times(between, shift=shift),
        stacked(renoise),
        process.draw_times(below),
        stacked(guidance_noise),
        process.draw_times(uniform(fake_level), **config.fake.times.model_dump()),
        stacked(fake_noise),
    )
