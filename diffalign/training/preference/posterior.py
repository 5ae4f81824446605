"""Latents drawn anew from the VAE's posterior, for `data.latent_sampling: posterior`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from diffalign.draws import draw, normal


def with_samples(config: Any, batch: Any, step: int, slots: list[int]) -> Any:
    """The batch with a sample of each image's posterior in place of its mean; the batch itself where no spread is known.

    Keyed by step, position in the step, group and image, as every other draw: neither processes nor micro-batches
    change it, and each image has its own, also where a group shares the training noise.
    """
    if batch.spread is None:
        return batch
    _, members, *shape = batch.latents.shape
    noise = torch.stack(
        [
            torch.stack(
                [
                    torch.from_numpy(
                        normal(draw(config.seed, "posterior", step=step, inner=s, group=g, member=m), shape)
                    )
                    for m in range(members)
                ]
            )
            for s, g in zip(slots, batch.group_ids, strict=True)
        ]
    )
    return replace(batch, latents=batch.latents + batch.spread * noise, spread=None)
