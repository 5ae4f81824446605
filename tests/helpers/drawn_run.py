"""A run that draws its own images (`train.online`) with the toy flow model and a reward that needs no weights.

python -m helpers.drawn_run RUN_DIR STEPS [SECTIONS]    the run as a program; SECTIONS: sections of the config, as JSON
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffalign.config import TrainConfig
from diffalign.data.prompts import PromptRow
from diffalign.pipelines.drawn_noise import initial_noise
from diffalign.pipelines.own_sampler import SamplerSteps
from diffalign.pipelines.paths import PathSteps
from diffalign.rewards import Reward
from diffalign.training.device import start_accelerator
from diffalign.training.preference.drawn_groups import DrawnGroups
from diffalign.training.preference.method import Preference
from diffalign.training.preference.online import Online
from diffalign.training.preference.samplers import PathSampler, Sampler
from diffalign.training.run import run
from helpers import toy
from helpers.tastes import redness

PROMPTS = ["a red cube", "two dogs", "a cat left of a cup", "snow"]


class Red(Reward):
    """How red an image is. unscored: every n-th image has no score; dies: at which call the process ends."""

    name = "red"
    columns = ("redness",)
    range = (-1.0, 1.0)
    licence = weights = "none"
    reads: ClassVar[tuple[str, ...]] = ()

    def __init__(self, unscored: int = 0, dies: int | None = None) -> None:
        self.unscored, self.dies, self.calls, self.seen = unscored, dies, 0, 0
        self.reasons = []

    def measure(self, images: list[Image.Image], prompts: list[str], metadata: Any = None) -> dict[str, torch.Tensor]:
        self.calls += 1
        if self.calls == self.dies:
            os._exit(9)
        numbers = range(self.seen, self.seen + len(images))
        self.seen += len(images)
        self.reasons = ["too dark" if self.unscored and n % self.unscored == 0 else "" for n in numbers]
        values = [np.nan if why else redness(image) for image, why in zip(images, self.reasons, strict=True)]
        return {"redness": torch.tensor(values, dtype=torch.float32)}


class DrawingToy(toy.ToyBackbone):
    """The toy model with a VAE: red, green and blue are logistic functions of the two channels."""

    def borrowed_vae(self) -> AbstractContextManager[None]:
        return nullcontext()

    def rescale_guided(self, guided: Tensor, with_prompt: Tensor) -> Tensor:
        return guided

    def decode_latents(self, latents: Tensor) -> Tensor:
        return torch.sigmoid(torch.stack([latents[:, 0], latents[:, 1], -latents[:, 0]], dim=1))

    def to_images(self, pixels: Tensor) -> list[Image.Image]:
        values = (255 * pixels).round().byte().permute(0, 2, 3, 1).numpy()
        return [Image.fromarray(one) for one in values]


class Words:
    """Embeddings of prompts: three numbers that follow from the text."""

    unconditional: ClassVar[dict[str, Tensor]] = {"prompt": torch.zeros(1, 3)}

    def batch(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        seeds = [sum(map(ord, prompt)) for prompt in prompts]
        return {"prompt": initial_noise(seeds, (3,))}


class Euler:
    """Draws by Euler's method on the flow."""

    def __init__(self, backbone: toy.ToyBackbone, steps: int) -> None:
        self.backbone, self.times = backbone, backbone.process.schedule(steps)

    def __call__(self, conditioning: dict[str, Tensor], seeds: list[int]) -> dict[str, Tensor]:
        x, process = initial_noise(seeds, toy.SHAPE), self.backbone.process
        for now, then in zip(self.times[:-1], self.times[1:], strict=True):
            t, after = now.expand(len(x)), then.expand(len(x))
            x = process.step(x, self.backbone.predict(x, t, conditioning), t, after)
        return {"latents": x}


def drawn_config(run_dir: Path, steps: int, **sections: Any) -> TrainConfig:
    """Return a config of 2 groups of 3 images a draw, two updates on each draw; keyword sections are merged over it."""
    online: dict[str, Any] = {
        "prompts": "p.txt", "rewards": [{"name": "red"}], "every": 2, "groups": 2, "images_per_prompt": 3, "steps": 3,
        "batch_size": 2, "old": {"decay": 0.5, "slope": 0.1},
    }  # fmt: skip
    train = sections.pop("train", {})
    plain: dict[str, Any] = {
        "data": {"path": None},
        "tune": {"reference": "old"},
        "labels": {"source": "scores.red", "transform": "optimality"},
        "objective": {"name": "nft", "anchor": 0.01},
        "noise": "independent",
        "checkpoint": {"every": 1, "keep": 100},
    }
    for name, values in sections.items():
        plain[name] = {**plain.get(name, {}), **values} if isinstance(values, dict) else values
    if "name" in sections.get("objective", {}):
        plain["objective"] = sections["objective"]
    own = {
        "steps": steps,
        "groups_per_step": 2,
        "micro_batch": 1,
        **train,
        "online": {**online, **train.get("online", {})},
    }
    return toy.toy_config(run_dir, train=own, **plain)


def method_for(config: TrainConfig, reward: Red, said: list[str] | None = None) -> Preference:
    """Return the method of a run of this config, ready for its first step."""
    online = config.train.online
    assert online is not None
    accelerator, say = start_accelerator(config), (said if said is not None else []).append
    torch.set_num_threads(1)
    backbone: Any = DrawingToy()
    words: Any = Words()
    shapes: dict[str, tuple[int, ...]] = {"latents": toy.SHAPE}
    sampler: Sampler = Euler(backbone, online.steps)
    steps = None
    if config.noise == "path":
        times, (first, end) = backbone.process.schedule(online.steps), online.path.steps_of(online.steps)
        own = SamplerSteps(times[:-1], times[1:])
        steps = PathSteps(own, first, end, online.path.noise_level, online.guidance_scale)
        shapes["path"] = (end - first + 1, *toy.SHAPE)
        sampler = PathSampler(backbone, steps, words.unconditional, toy.SHAPE)
    tracked = config.noise == "tracked"
    groups = DrawnGroups([PromptRow(p) for p in PROMPTS], words, online, config.seed, shapes, tracked, steps)
    loop = Online(config, backbone, groups, {"red": reward}, sampler, accelerator, say)
    return Preference(config, backbone, groups, accelerator, say, online=loop)


def drawn_run(
    run_dir: Path, steps: int, reward: Red | None = None, said: list[str] | None = None, **sections: Any
) -> list[dict[str, float]]:
    """Run, or resume, and return the rows of metrics.jsonl."""
    run_dir.mkdir(parents=True, exist_ok=True)
    config = drawn_config(run_dir, steps, **sections)
    method = method_for(config, reward or Red(), said)
    run(config, method, say=lambda _: None)
    return rows(run_dir / "metrics.jsonl")


def rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    drawn_run(Path(sys.argv[1]), int(sys.argv[2]), **(json.loads(sys.argv[3]) if len(sys.argv) > 3 else {}))
