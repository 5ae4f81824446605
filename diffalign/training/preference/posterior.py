"""Samples of the VAE's posterior in place of its mean, for `data.latent_sampling: posterior`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffalign.config import TrainConfig
from diffalign.draws import draw, normal

if TYPE_CHECKING:
    from diffalign.data.training_source import Batch


def with_samples(config: TrainConfig, batch: Batch, step: int, slots: list[int]) -> Batch:
    """Replace each image's posterior mean by a sample; return the batch itself where no spread is known.

    The draw is keyed by step, position in the step, group and image, as every other: neither processes nor micro-batches
    change it, and each image has its own, also where a group shares the training noise.
    """
    if batch.spread is None:
        return batch
    members, shape = batch.latents.shape[1], tuple(batch.latents.shape[2:])

    def noise(slot: int, group: str, member: int) -> Tensor:
        key = draw(config.seed, "posterior", step=step, inner=slot, group=group, member=member)
        return torch.from_numpy(normal(key, shape))

    drawn = torch.stack(
        [
            torch.stack([noise(slot, group, member) for member in range(members)])
            for slot, group in zip(slots, batch.group_ids, strict=True)
        ]
    )
    return replace(batch, latents=batch.latents + batch.spread * drawn, spread=None)
