"""A reward server in a thread, and rewards that show what it does with them."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from diffalign import web
from diffalign.rewards import Reward
from diffalign.serving.app import reward_app
from diffalign.serving.service import Service, Settings


class Slow(Reward):
    """Scores the width times `factor`, after `seconds`; a batch with the prompt `broken` raises an error.

    loaded: the labels of all such rewards whose model is in memory.
    """

    name = "slow"
    columns = ("slow", "batch")
    range = (0.0, float("inf"))
    licence = weights = "none"

    def __init__(self, factor: float = 1.0, seconds: float = 0.0, loaded: set[float] | None = None) -> None:
        self.factor, self.seconds = factor, seconds
        self.loaded = set() if loaded is None else loaded
        self.most_loaded = 0
        self.reasons = []
        self.batches: list[int] = []
        self.free_to_go = threading.Event()
        self.free_to_go.set()

    def options(self) -> dict[str, Any]:
        return {"factor": self.factor}

    def measure(self, images: list[Image.Image], prompts: list[str], metadata: Any = None) -> dict[str, torch.Tensor]:
        self.loaded.add(self.factor)
        self.most_loaded = max(self.most_loaded, len(self.loaded))
        self.free_to_go.wait(120)
        time.sleep(self.seconds)
        self.batches.append(len(images))
        if "broken" in prompts:
            raise ValueError("a broken prompt")
        self.reasons = ["an odd prompt" if "odd" in prompt else "" for prompt in prompts]
        nan = float("nan")
        widths = [nan if why else self.factor * i.width for i, why in zip(images, self.reasons, strict=True)]
        return {"slow": torch.tensor(widths), "batch": torch.full((len(images),), float(len(images)))}

    def free(self) -> None:
        self.loaded.discard(self.factor)


@dataclass(frozen=True)
class Running:
    """A running server. root: its address."""

    root: str
    service: Service


@contextlib.contextmanager
def serving(
    rewards: dict[str, Reward], port: int = 0, token: str | None = None, body: int = 2**22, **settings: Any
) -> Iterator[Running]:
    """Serve rewards in a thread."""
    address, limits = web.Address(port=port, token=token), web.Limits(body=body)
    service = Service(rewards, Settings(**settings), limits.body)
    with web.listen(address) as listener, service, web.running(reward_app(service, address, limits), listener) as root:
        yield Running(root, service)
