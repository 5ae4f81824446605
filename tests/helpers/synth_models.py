"""A generator and a reward for `synth` whose outputs are known."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffalign.config import GeneratorSection, RewardSection
from diffalign.pipelines.settings import SamplingSettings
from diffalign.rewards import Reward

CONFIG = """
device: cpu
prompts: {source: PROMPTS}
generators:
- {name: one, model: {path: m1}, images_per_prompt: 2, batch_size: 5}
- {name: two, model: {path: m2}, images_per_prompt: 1, batch_size: 4}
rewards: [{name: bright, detector: null}, {name: red, detector: null}]
contact_sheet: 3
"""


class Painter:
    """Pictures that depend on the prompt, the seed and, as a real model's last bits do, on the batch."""

    def __init__(self, name: str, log: Path | None = None, pause: float = 0.0, **facts: str) -> None:
        self.name, self.log, self.pause, self.known = name, log, pause, facts

    longest = 5

    def count_cut(self, prompts: list[str]) -> int:
        return sum(len(prompt.split()) > self.longest for prompt in set(prompts))

    def facts(self) -> dict[str, str]:
        return self.known

    def noise_record(self, settings: SamplingSettings) -> dict[str, Any]:
        return {"exact": False, "family": "", "shape": [], "sampler": "brush", "reason": "paint has no noise"}

    def draw(
        self, prompts: list[str], seeds: list[int], settings: SamplingSettings | None = None, **given: Any
    ) -> list[tuple[Image.Image, Any]]:
        time.sleep(self.pause)
        if self.log:
            with self.log.open("a") as stream:
                stream.write("".join(f"{self.name} {seed}\n" for seed in seeds))
        if "bad" in prompts:
            raise ValueError("this prompt cannot be drawn")
        pictures = [
            np.random.default_rng([seed, len(seeds), sum(p.encode())]).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            for p, seed in zip(prompts, seeds, strict=True)
        ]
        latents = [np.full((1, 2, 2), seed % 7, np.float32) if given["latents"] else None for seed in seeds]
        return [(Image.fromarray(p), z) for p, z in zip(pictures, latents, strict=True)]

    def close(self) -> None:
        pass


class Channel(Reward):
    """Mean of one colour channel."""

    columns, version, weights, licence, range = ("mean",), "1", "none", "none", (0.0, 255.0)

    def __init__(self, name: str) -> None:
        self.name, self.reasons = name, [""]

    def measure(self, images: list[Image.Image], prompts: list[str], facts: Any = None) -> dict[str, Any]:
        self.reasons = [""] * len(images)
        channel = {"bright": slice(None), "red": 0}[self.name]
        return {"mean": torch.tensor([float(np.asarray(i)[..., channel].mean()) for i in images])}


def open_painter(section: GeneratorSection, device: str) -> Painter:
    """What actors of a stand-in for Ray open: a function that can travel."""
    return Painter(section.name)


def open_channel(section: RewardSection, device: str) -> Channel:
    """As `open_painter`, for rewards."""
    return Channel(section.name)
