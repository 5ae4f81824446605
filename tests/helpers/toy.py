"""A backbone and a source of groups small enough that a training step takes a millisecond and nothing heavy is imported.

The backbone is one frozen linear map with a low-rank policy beside it, behind the interface of `diffalign.pipelines`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn

from diffalign.config import TrainConfig
from diffalign.objectives import OBJECTIVES
from diffalign.pipelines.process import Flow
from diffalign.training.device import start_accelerator
from diffalign.training.preference.method import Preference
from diffalign.training.protocols import Say
from diffalign.training.run import TrainResult, run
from diffalign.training.validation import Validation

SHAPE = (2, 4, 4)
WIDTH = 32


class Trunk(nn.Module):
    def __init__(self, bfloat16: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.base = nn.Parameter(torch.randn(WIDTH + 4, WIDTH, generator=generator) / 6, requires_grad=False)
        self.down = nn.Parameter(torch.randn(WIDTH + 4, 3, generator=generator) / 6)
        self.up = nn.Parameter(torch.zeros(3, WIDTH))
        self.adapted = True
        self.second = nn.ParameterDict()
        self.following = False

    def forward(self, x: Tensor, prompt: Tensor, time: Tensor) -> Tensor:
        features = torch.cat([x.flatten(1), prompt, time[:, None]], dim=1)
        out = features @ self.base
        if self.adapted:
            out = out + features @ self.down @ self.up
        elif self.following:
            out = out + features @ self.second["down"] @ self.second["up"]
        return out.view_as(x)


class ToyBackbone:
    device, dtype, family, guidance = torch.device("cpu"), torch.float32, "toy", None

    def __init__(self) -> None:
        self.process = Flow()
        self.trunk = Trunk()

    def fingerprint(self) -> str:
        return "toy"

    def add_lora(self, *args: Any, **kwargs: Any) -> None:
        pass

    def follow_policy(self, keep_base: bool = False) -> None:
        for name, value in self.trainable().items():
            self.trunk.second[name] = nn.Parameter(value.detach().clone(), requires_grad=False)

    def followers(self) -> dict[str, nn.Parameter]:
        return dict(self.trunk.second.items())

    @contextmanager
    def role(self, name: str) -> Iterator[None]:
        self.trunk.adapted = name == "policy"
        self.trunk.following = name == "reference" and len(self.trunk.second) > 0
        try:
            yield
        finally:
            self.trunk.adapted, self.trunk.following = True, False

    def predict(
        self, noisy: Tensor, t: Tensor, conditioning: dict[str, Tensor], module: nn.Module | None = None
    ) -> Tensor:
        return (module or self.trunk)(noisy, conditioning["prompt"], t)

    def rescale_guided(self, guided: Tensor, with_prompt: Tensor) -> Tensor:
        return guided

    def image_positions(self, features: Tensor, noisy: Tensor) -> Tensor:
        return features

    def trainable(self) -> dict[str, nn.Parameter]:
        return {"down": self.trunk.down, "up": self.trunk.up}

    def save_weights(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: p.detach().clone() for k, p in self.trainable().items()}, folder / "weights.safetensors")


@dataclass
class Batch:
    latents: Tensor
    conditioning: dict[str, Tensor]
    rewards: Tensor
    mask: Tensor
    group_ids: list[str]
    prompts: list[str]
    spread: Tensor | None = None
    seeds: Tensor | None = None
    paths: Any = None


class ToySource:
    """Groups of random latents; the reward is their mean, so there is something to learn."""

    def __init__(self, groups: int = 13, members: int = 4) -> None:
        rng = np.random.default_rng(0)
        self.latents = torch.from_numpy(rng.standard_normal((groups, members, *SHAPE), dtype=np.float32))
        self.rewards = self.latents.mean(dim=(2, 3, 4))
        self.prompts = torch.from_numpy(rng.standard_normal((groups, 3), dtype=np.float32))
        self.mask = torch.ones(groups, dtype=torch.bool)
        self.group_ids = [f"g{i}" for i in range(groups)]
        self.unconditional = {"prompt": torch.zeros(1, 3)}
        self.buckets = [0] * groups

    def __len__(self) -> int:
        return len(self.latents)

    def content(self) -> str:
        return f"{float(self.latents.sum())} {float(self.prompts.sum())}"

    def batch(self, indices: list[int]) -> Batch:
        names = [self.group_ids[i] for i in indices]
        return Batch(
            self.latents[indices],
            {"prompt": self.prompts[indices]},
            self.rewards[indices],
            self.mask[indices],
            names,
            names,
        )


def labelled(objective: str) -> ToySource:
    """A source whose labels an objective takes: roles, advantages, or shares in [0, 1], in the order of the rewards."""
    source = ToySource()
    places = source.rewards.argsort(dim=1).argsort(dim=1)
    kind = OBJECTIVES[objective].label_kind
    source.rewards = (places >= 2).float() if kind == "role" else places / (source.rewards.shape[1] - 1)
    if kind == "advantage":
        source.rewards = source.rewards - 0.5
    return source


class SlowSource:
    """A source that takes its time for each batch."""

    def __init__(self, source: Any, seconds: float) -> None:
        self.source, self.seconds = source, seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def __len__(self) -> int:
        return len(self.source)

    def batch(self, indices: list[int]) -> Any:
        time.sleep(self.seconds)
        return self.source.batch(indices)


def train(
    config: TrainConfig,
    *,
    backbone: Any,
    source: Any,
    say: Say = print,
    accelerator: Accelerator | None = None,
    **given: Any,
) -> TrainResult:
    """A run of preference training on any backbone. `given`: further arguments of `run`."""
    method = Preference(config, backbone, source, accelerator or start_accelerator(config), say)
    return run(config, method, say=say, **given)


@dataclass(frozen=True)
class Scripted(Validation):
    """Scores by step instead of images."""

    script: dict[int, float] = field(default_factory=dict)

    def run(self, run_dir: Path, done: int) -> dict[str, Any]:
        return {"step": done, "scores": {"r.c": [self.script.get(done, 0.0), self.script.get(done, 0.0)]}}


def toy_config(run_dir: Path, **sections: dict[str, Any]) -> TrainConfig:
    """A config for ToyBackbone; keyword sections are merged over the defaults."""
    plain: dict[str, Any] = {
        "run_dir": str(run_dir),
        "device": "cpu",
        "model": {"path": "toy"},
        "data": {"path": "toy"},
        "objective": {"name": "dpo", "beta": 20.0},
        "train": {"steps": 12, "groups_per_step": 4, "micro_batch": 4, "threads": 1},
        "optimizer": {"lr": 1e-2},
        "checkpoint": {"every": 4},
        "tracking": {"trackers": []},
    }
    for name, values in sections.items():
        if name == "objective" and values.get("name", "dpo") != "dpo":
            plain[name] = values  # another objective has no beta, or another one
        else:
            plain[name] = {**plain.get(name, {}), **values} if isinstance(values, dict) else values
    return TrainConfig.model_validate(plain)
