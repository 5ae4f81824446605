"""Run the real training loop on random groups: its steps timed one by one, one of them measured by phase."""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from diffalign.config import TrainConfig
from diffalign.data.training_source import Batch
from diffalign.draws import draw, normal
from diffalign.training.cuda_rules import step_on_meta
from diffalign.training.device import start_accelerator
from diffalign.training.memory import predict_memory
from diffalign.training.preference.method import Preference
from diffalign.training.preference.policy import build_objective
from diffalign.training.run import run
from diffalign.training.tune import make_trainable
from shared import random_models
from shared.step_phases import flops_by_phase, peaks_by_phase


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
        return random_models.backbone(
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
        shape = random_models.latent_shape(cell.model, cell.side)
        self.latents = torch.from_numpy(normal(draw(0, "latents"), (count, cell.images, *shape)))
        self.conditioning = random_models.embeddings(cell.model, count)
        self.unconditional = random_models.embeddings(cell.model)
        self.rewards = torch.linspace(1.0, 0.0, cell.images).repeat(count, 1)
        self.mask = torch.ones(count, dtype=torch.bool)
        self.group_ids = self.prompts = [f"g{i}" for i in range(count)]
        self.buckets = [0] * count
        self.watch = watch

    def __len__(self) -> int:
        return len(self.latents)

    def content(self) -> str:
        return "random"

    def batch(self, indices: list[int]) -> Batch:
        if self.watch is not None:
            self.watch()
        names = [self.group_ids[i] for i in indices]
        conditioning = {key: value[indices] for key, value in self.conditioning.items()}
        return Batch(self.latents[indices], conditioning, self.rewards[indices], self.mask[indices], names, names)


class Enough(Exception):
    """Ends a training loop where nothing more is measured: no checkpoint and no weights are written."""


class Watch:
    """Called when a step begins. After `warm` steps it times `steps` of them, then one gives its memory and one its FLOPs:
    counting FLOPs keeps tensors alive for a while, and both slow the step."""

    def __init__(self, backbone: Any, cuda: bool, warm: int, steps: int, references: int) -> None:
        self.backbone, self.cuda, self.warm, self.last, self.references = backbone, cuda, warm, warm + steps, references
        self.calls: list[float] = []
        self.peaks: dict[str, int] = {}
        self.flops: dict[str, int] = {}
        self._running = ExitStack()

    def __call__(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        self._running.close()
        done = len(self.calls)
        self.calls.append(time.perf_counter())
        trunks = self.backbone.trunks()
        if done == self.last:
            self.peaks = self._running.enter_context(peaks_by_phase(trunks, self.cuda))
        elif done == self.last + 1:
            self.flops = self._running.enter_context(flops_by_phase(trunks, self.references))
        elif done == self.last + 2:
            raise Enough

    def seconds(self) -> list[float]:
        """Of each timed step."""
        kept = self.calls[self.warm : self.last + 1]
        return [after - before for before, after in pairwise(kept)]


def measured(cell: Cell, device: str, steps: int, warm: int) -> dict[str, Any]:
    """Seconds of each step, FLOPs and peak bytes by phase, and the predicted peak by part."""
    cuda = device == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        config = cell.config(Path(folder), 10**6, device)
        shape = (cell.groups * cell.images, *random_models.latent_shape(cell.model, cell.side))
        predicted = predict_memory(
            config, cell.backbone(config, device), shape, random_models.embeddings(cell.model), cuda=cuda
        )
        backbone = cell.backbone(config, device)
        watch = Watch(backbone, cuda, warm, steps, int(build_objective(config.objective).needs_reference))
        with suppress(Enough):
            method = Preference(config, backbone, RandomGroups(cell, watch), start_accelerator(config), print)
            run(config, method, say=lambda _: None)
        return {"seconds": watch.seconds(), "flops": watch.flops, "peaks": watch.peaks, "predicted": predicted}


def backward_flops(cell: Cell) -> int:
    """Count what backward needs where nothing is computed a second time: on shapes alone, one image times their number."""
    with tempfile.TemporaryDirectory() as folder:
        config = cell.config(Path(folder), 1, "cpu")
    backbone = random_models.backbone(cell.model, "meta", torch.bfloat16)
    make_trainable(backbone, config.tune, config.seed, keep_reference=False)
    at: dict[str, int] = {}
    shape = (1, *random_models.latent_shape(cell.model, cell.side))
    with FlopCounterMode(display=False) as counter:
        step_on_meta(
            backbone, shape, random_models.embeddings(cell.model), reference=False, autocast=torch.bfloat16,
            phase=lambda ended: at.update({ended: int(counter.get_total_flops())}),
        )  # fmt: skip
    return cell.groups * cell.images * (at["backward"] - at["policy"])


def model_flops(cell: Cell, flops: dict[str, int]) -> int:
    """Return what the step needs: the counted phases, with a backward that repeats no forward."""
    if not cell.settings.get("model.gradient_checkpointing"):
        return sum(flops.values())
    return sum(flops.values()) - flops["backward"] + backward_flops(cell)


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
