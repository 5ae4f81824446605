"""Everything random in a preference step, by name: neither micro-batches, processes nor a resume can change it."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffalign.config import TrainConfig
from diffalign.draws import draw, normal
from diffalign.pipelines import NoiseProcess
from diffalign.pipelines.drawn_noise import initial_noise


@dataclass(frozen=True)
class Draws:
    """What was drawn for a micro-batch of B groups of K images.

    members [B, n]: the images of each group that this step looks at, all of them or `data.group_size`. noise [B, K, C,
    h, w] float32: drawn, or what made each image; None where it is found by inversion, or the steps of a path take its place.
    path_step [B]: which of these; None without paths. times [B] in the process's units;
    order [B, K] breaks ties; dropped [B] bool, groups whose prompt is replaced by the empty one.
    """

    members: Tensor
    noise: Tensor | None
    times: Tensor
    order: Tensor
    dropped: Tensor
    path_step: Tensor | None = None


def make_draws(
    config: TrainConfig,
    process: NoiseProcess,
    step: int,
    slots: list[int],
    group_ids: list[str],
    shape: torch.Size,
    labelled: Tensor | None = None,
    seeds: Tensor | None = None,
    path_times: Tensor | None = None,
) -> Draws:
    """Draw for the groups at positions `slots` of a step; `shape` is that of the latents, [B, K, C, h, w].

    labelled: bool [B, K], which images `data.group_size` draws from first; None: all. seeds: [B, K] of the noise that made the
    images (`noise: tracked`), -1 where there is no image. path_times: of a path's steps (`noise: path`), [n].
    The slot is part of the key, so a group that a step meets twice (at the seam of two epochs) is not drawn alike.
    """
    _, members, *latent = shape
    size = config.data.group_size or members

    def one(stream: str, slot: int, group: str, member: int | None = None) -> np.random.Generator:
        return draw(config.seed, stream, step=step, inner=slot, group=group, member=member)

    noise, uniform, order, dropped, chosen = [], [], [], [], []
    for row, (slot, group) in enumerate(zip(slots, group_ids, strict=True)):
        if config.noise == "shared":
            noise.append(normal(one("noise", slot, group), (1, *latent)).repeat(members, axis=0))
        elif config.noise == "independent":
            each = [normal(one("noise", slot, group, m), (1, *latent)) for m in range(members)]
            noise.append(torch.cat([torch.from_numpy(n) for n in each]).numpy())
        elif config.noise == "tracked":
            if seeds is None:
                raise ValueError("noise=tracked needs the seeds of the images")
            noise.append(initial_noise(seeds[row].clamp_min(0).tolist(), latent).numpy())
        uniform.append(one("time", slot, group).random())
        order.append(one("order", slot, group).permutation(members))
        every = np.arange(members) if size == members else one("members", slot, group).permutation(members)
        if labelled is not None and size < members:
            every = every[np.argsort(~labelled[row].numpy()[every], kind="stable")]
        chosen.append(np.sort(every[:size]))
        dropped.append(bool(one("prompt_dropout", slot, group).random() < config.train.prompt_dropout))
    fractions = torch.tensor(uniform, dtype=torch.float64)
    if config.times.stratified:
        # The order of the groups is random, so their places in the step say nothing about them.
        fractions = (torch.tensor(slots) + fractions) / config.train.groups_per_step
    path_step = None
    if path_times is None:
        times = process.draw_times(fractions, **config.times.density())
    else:
        path_step = (fractions * len(path_times)).long()
        times = path_times[path_step]
    if config.noise == "inverted":
        times = process.invertible_times(times, config.inversion.steps)
    return Draws(
        torch.from_numpy(np.stack(chosen)),
        torch.stack([torch.from_numpy(n) for n in noise]) if noise else None,
        times,
        torch.stack([torch.from_numpy(o) for o in order]),
        torch.tensor(dropped),
        path_step,
    )
