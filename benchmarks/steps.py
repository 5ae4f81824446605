"""Run the real training loop on random groups: its steps timed one by one, one of them measured by phase."""

from __future__ import annotations

import itertools
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import models
import torch
from phases import Phases

from diffalign.config import TrainConfig
from diffalign.data.source import Batch
from diffalign.draws import draw, normal
from diffalign.training.footprint import predict_memory
from diffalign.training.loop import build_objective, train


@dataclass(frozen=True)
class Cell:
    """What is measured: `settings` are dotted keys of the config, as on the command line."""

    model: str
    objective: str = "dpo"
    tune: str = "lora"
    side: int = 1024
    groups: int = 1
    images: int = 2
    settings: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        more = "".join(f" {key}={value}" for key, value in self.settings.items())
        return f"{self.model} {self.objective} {self.tune} {self.side}px {self.groups}x{self.images}{more}"

    def config(self, run_dir: Path, steps: int, device: str) -> TrainConfig:
        plain: dict[str, Any] = {
            "run_dir": str(run_dir),
            "device": device,
            "model": {"path": self.model, "dtype": "bfloat16" if device == "cuda" else "float32"},
            "data": {"path": "random"},
            "tune": {"kind": self.tune},
            "objective": {"name": self.objective},
            "train": {"steps": steps, "groups_per_step": self.groups, "micro_batch": self.groups, "log_every": 10},
            "optimizer": {"lr": 1e-6},
            "checkpoint": {"every": 10**6},
            "tracking": {"trackers": []},
        }
        for key, value in self.settings.items():
            section, _, name = key.rpartition(".")
            place = plain.setdefault(section, {}) if section else plain
            place[name] = value
        return TrainConfig.model_validate(plain)

    def backbone(self, config: TrainConfig, device: str) -> Any:
        return models.backbone(
            self.model,
            device,
            torch.bfloat16 if config.model.dtype == "bfloat16" else torch.float32,
            gradient_checkpointing=config.model.gradient_checkpointing,
            quantize=config.model.quantize,
            channels_last=config.model.channels_last,
            attention=config.model.attention,
        )


class RandomGroups:
    """Groups of random latents whose first image is the best. Each call of `batch` begins a step; `watch` learns of it."""

    def __init__(self, cell: Cell, watch: Any = None, count: int = 8) -> None:
        shape = models.latent_shape(cell.model, cell.side)
        self.latents = torch.from_numpy(normal(draw(0, "latents"), (count, cell.images, *shape)))
        self.conditioning = models.embeddings(cell.model, count)
        self.unconditional = models.embeddings(cell.model)
        self.rewards = torch.linspace(1.0, 0.0, cell.images).repeat(count, 1)
        self.mask = torch.ones(count, dtype=torch.bool)
        self.group_ids = self.prompts = [f"g{i}" for i in range(count)]
        self.buckets = [0] * count
        self.watch = watch

    def __len__(self) -> int:
        return len(self.latents)

    def batch(self, indices: list[int]) -> Batch:
        if self.watch is not None:
            self.watch()
        names = [self.group_ids[i] for i in indices]
        conditioning = {key: value[indices] for key, value in self.conditioning.items()}
        return Batch(self.latents[indices], conditioning, self.rewards[indices], self.mask[indices], names, names)


class Stopwatch:
    """Seconds of each step from one call to the next; before step `measure` begins, `begin` is called."""

    def __init__(self, cuda: bool, measure: int, begin: Any) -> None:
        self.cuda, self.measure, self.begin = cuda, measure, begin
        self.calls: list[float] = []

    def __call__(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        if len(self.calls) == self.measure:
            self.begin()
        self.calls.append(time.perf_counter())

    def seconds(self, warm: int) -> list[float]:
        """Of the steps after `warm` of them and before the measured one."""
        kept = self.calls[warm : self.measure + 1]
        return [after - before for before, after in itertools.pairwise(kept)]


def measured(cell: Cell, device: str, steps: int, warm: int) -> dict[str, Any]:
    """Seconds a step, FLOPs and peak bytes by phase, and the predicted peak by part."""
    cuda = device == "cuda"
    phases = Phases(cuda)
    counted = Phases(cuda)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        config = cell.config(Path(folder), warm + steps + 1, device)
        shape = (cell.groups * cell.images, *models.latent_shape(cell.model, cell.side))
        predicted = predict_memory(
            config, cell.backbone(config, device), shape, models.embeddings(cell.model), cuda=cuda
        )
        backbone = cell.backbone(config, device)
        watch = Stopwatch(
            cuda,
            warm + steps,
            lambda: stack.enter_context(phases.measured(backbone.trunks(), count=not cuda)),
        )
        source = RandomGroups(cell, watch)
        train(config, backbone=backbone, source=source, say=lambda _: None)
        stack.pop_all().close()
        if cuda:
            # Counting keeps tensors alive for a while, so memory and FLOPs are measured in steps of their own.
            with tempfile.TemporaryDirectory() as other:
                backbone = cell.backbone(config, device)
                again = config.model_copy(
                    update={"run_dir": Path(other), "train": config.train.model_copy(update={"steps": 1})}
                )
                with counted.measured(backbone.trunks()):
                    train(again, backbone=backbone, source=RandomGroups(cell), say=lambda _: None)
        objective = build_objective(config.objective)
        flops = (counted if cuda else phases).split(int(objective.needs_reference))
    return {"seconds": watch.seconds(warm), "flops": flops, "peaks": phases.peaks, "predicted": predicted}


def model_flops(flops: dict[str, int], checkpointing: bool) -> int:
    """What the step needs: without the second policy forward that gradient checkpointing makes within backward."""
    return sum(flops.values()) - (flops["policy"] if checkpointing else 0)


def matmul_ceiling(device: str, dtype: torch.dtype, sizes: tuple[int, ...]) -> float:
    """FLOPs a second of the fastest square matrix product, the best of a few runs of each size."""
    best = 0.0
    for size in sizes:
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        for _ in range(5):
            if device == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(4):
                product = a @ b
            if device == "cuda":
                torch.cuda.synchronize()
            best = max(best, 4 * 2 * size**3 / (time.perf_counter() - started))
            del product
    return best
