"""Draw images with the model that trains, between two of its steps, and show them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image

from diffalign.files import make_folder

if TYPE_CHECKING:
    from diffalign.pipelines import Backbone


@contextmanager
def drawing(backbone: Backbone, role: str) -> Iterator[None]:
    """Draw as `role` inside the block: the VAE on the device, the trunk in eval mode, and both as before after it."""
    training = backbone.trunk.training
    backbone.trunk.eval()
    try:
        with backbone.borrowed_vae(), backbone.role(role):
            yield
    finally:
        backbone.trunk.train(training)


@contextmanager
def own_random_numbers(backbone: Backbone, seed: int) -> Iterator[None]:
    """Seed torch's global generator inside the block, for pipelines that give their scheduler none; restore it after."""
    device = backbone.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def save_grid(rows: Sequence[Sequence[Image.Image]], path: Path) -> None:
    """Write rows of images of one size as one PNG."""
    wide, high = rows[0][0].size
    grid = Image.new("RGB", (max(map(len, rows)) * wide, len(rows) * high))
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            grid.paste(image, (x * wide, y * high))
    make_folder(path.parent)
    grid.save(path)
