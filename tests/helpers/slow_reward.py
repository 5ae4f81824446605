"""A reward that takes its time and writes down where it worked, for `-r helpers.slow_reward:Slow`."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

from diffalign.rewards import Reward

LOG = "DIFFALIGN_TEST_LOG"
"""The environment variable that names the file of what was done: a line for each batch."""

PATIENCE = 400.0  # seconds


def note(what: str) -> None:
    """Append a line to the log, if there is one: the id of the node, and what was done."""
    if path := os.environ.get(LOG):
        import ray

        node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else "here"
        with Path(path).open("a") as stream:
            stream.write(f"{node} {what}\n")


def noted() -> list[tuple[str, str]]:
    """Return (node, what was done) of every line of the log."""
    path = Path(os.environ.get(LOG, os.devnull))
    lines = path.read_text().splitlines() if path.is_file() else []
    return [(line.partition(" ")[0], line.partition(" ")[2]) for line in lines]


class Slow(Reward):
    """The mean brightness, plus the batch's mean: another batch gives other scores."""

    name = "slow"
    columns = ("slow",)
    range = (0.0, 510.0)
    licence = weights = "none"
    reads: ClassVar[tuple[str, ...]] = ("prompt",)

    def __init__(self, pause: float = 0.0, dies_on: str = "", fails_on: str = "", nodes: int = 0) -> None:
        """nodes: after the first batch, wait until so many nodes have worked."""
        self.pause, self.dies_on, self.fails_on, self.nodes, self.reasons = pause, dies_on, fails_on, nodes, []

    def measure(self, images: list[Image.Image], prompts: list[str], metadata: Any = None) -> dict[str, torch.Tensor]:
        time.sleep(self.pause)
        note(" ".join(prompts))
        deadline = time.monotonic() + PATIENCE
        while self.nodes and len(log := noted()) > 1 and len({node for node, _ in log}) < self.nodes:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        if self.dies_on and any(self.dies_on in prompt for prompt in prompts):
            os._exit(1)
        if self.fails_on and any(self.fails_on in prompt for prompt in prompts):
            raise ValueError("this prompt cannot be scored")
        self.reasons = [""] * len(images)
        means = torch.tensor([float(np.asarray(image).mean()) for image in images])
        return {"slow": means + means.mean()}
