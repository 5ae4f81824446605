"""Groups of random latents for a tiny genuine model, and a config that trains it on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from diffalign.draws import draw, normal
from helpers import toy

TRAJECTORIES = Path(__file__).parents[1] / "trajectories"

PROMPTS = ["a red cube", "two dogs", "a cat left of a cup", "snow"]


class Source:
    """Four groups of three random latents; the second image is the best, the third the worst."""

    def __init__(self, backbone: Any) -> None:
        channels = backbone.latent_channels
        noise = [normal(draw(0, "latents", group=i), (3, channels, 8, 8)) for i in range(4)]
        self.latents = torch.stack([torch.from_numpy(n) for n in noise])
        self.conditioning = {k: v.float() for k, v in backbone.encode_prompts(PROMPTS).items()}
        self.unconditional = {k: v.float() for k, v in backbone.encode_unconditional().items()}
        self.rewards = torch.tensor([[0.5, 1.0, 0.0]]).repeat(4, 1)
        self.group_ids = [f"g{i}" for i in range(4)]
        self.buckets = [0] * 4

    def __len__(self) -> int:
        return 4

    def batch(self, indices: list[int]) -> toy.Batch:
        names = [self.group_ids[i] for i in indices]
        conditioning = {k: v[indices] for k, v in self.conditioning.items()}
        return toy.Batch(
            self.latents[indices],
            conditioning,
            self.rewards[indices],
            torch.ones(len(indices), dtype=torch.bool),
            names,
            names,
        )


def config_for(folder: Path, run_dir: Path, steps: int, **sections: Any) -> Any:
    return toy.toy_config(
        run_dir,
        model={"path": str(folder)},
        tune={"rank": 4, "alpha": 4},
        objective={"name": "dpo", "beta": 200.0},
        train={"steps": steps, "groups_per_step": 2, "micro_batch": 2, "threads": 1},
        **sections,
    )
