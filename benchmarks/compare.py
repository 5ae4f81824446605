"""Our step, the common script's and the bare one, turn by turn in one run, on a reduced SDXL with SDXL's shares of FLOPs."""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import torch
from common_script import CommonScript
from steps import Cell, RandomGroups

from diffalign.training.loop import train
from diffalign.training.optim import build_optimizer

MODEL, SIDE = "small-sdxl", 256


def timed(what: Callable[[], object]) -> float:
    started = time.perf_counter()
    what()
    return time.perf_counter() - started


class Turns:
    """Between two of our steps the others have theirs. Ours runs from the end of one call to the beginning of the next."""

    def __init__(self, others: dict[str, Callable[[], object]]) -> None:
        self.others = others
        self.rounds: list[dict[str, float]] = []
        self.left = 0.0

    def __call__(self) -> None:
        now = time.perf_counter()
        if self.left:
            self.rounds[-1]["ours"] = now - self.left
        self.rounds.append({name: timed(step) for name, step in self.others.items()})
        self.left = time.perf_counter()


def bare_step(backbone: Any, optimizer: torch.optim.Optimizer, cell: Cell) -> Callable[[], None]:
    """Reference forward, policy forward, mean squared error, backward, update; everything else is at hand."""
    source = RandomGroups(cell)
    flat = source.latents[: cell.groups].flatten(0, 1)
    noise = torch.randn(flat.shape, generator=torch.Generator().manual_seed(0))
    times = backbone.process.draw_times(torch.full((len(flat),), 0.5, dtype=torch.float64))
    noisy, target = backbone.process.add_noise(flat, noise, times), backbone.process.target(flat, noise, times)
    repeated = {k: v[: cell.groups].repeat_interleave(cell.images, dim=0) for k, v in source.conditioning.items()}

    def step() -> None:
        with torch.no_grad(), backbone.role("reference"):
            backbone.predict(noisy, times, repeated)
        with backbone.role("policy"):
            (backbone.predict(noisy, times, repeated) - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def compare(rounds: int, pairs: int) -> dict[str, Any]:
    """Median seconds, and medians of the ratios within a round, the first of which is not counted."""
    cell = Cell(MODEL, "dpo", "lora", SIDE, pairs, 2)
    with tempfile.TemporaryDirectory() as folder:
        config = cell.config(Path(folder), rounds + 2, "cpu")
        ours = models.backbone(MODEL)
        theirs, plain = copy.deepcopy(ours), copy.deepcopy(ours)
        optimizers = []
        for backbone in (theirs, plain):
            backbone.add_lora(config.tune.rank, config.tune.alpha)
            optimizers.append(build_optimizer(config.optimizer, backbone.trainable().values()))
        script = CommonScript(theirs.trunk, optimizers[0], config.objective.beta, SIDE, pairs)
        turns = Turns({
            "common": script, "bare": bare_step(plain, optimizers[1], cell), "encoding": script.encode,
        })  # fmt: skip
        train(config, backbone=ours, source=RandomGroups(cell, turns), say=lambda _: None)
    kept = [turn for turn in turns.rounds[1:] if "ours" in turn]
    found: dict[str, Any] = {name: statistics.median(turn[name] for turn in kept) for name in kept[0]}
    found["common / ours"] = statistics.median(turn["common"] / turn["ours"] for turn in kept)
    found["ours / bare"] = statistics.median(turn["ours"] / turn["bare"] for turn in kept)
    for name, value in found.items():
        print(f"{name:16} {value:.3f}")
    return {"rounds": len(kept), "pairs": pairs, "seconds": {k: v for k, v in found.items() if "/" not in k},
            "ratios": {k: v for k, v in found.items() if "/" in k}}  # fmt: skip
