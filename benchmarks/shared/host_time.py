"""The host's part of a step: what Python and torch take to launch it, as a ratio to a fixed loop that cancels the machine."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from diffalign.pipelines import Backbone
from shared import random_models

LOOP = 10_000
"""Additions of one number in the loop that host time is divided by."""


def cpu_seconds(call: Callable[[], object], repeat: int = 5) -> float:
    """Return the least CPU time of the process over some calls, in seconds; other processes do not count."""
    times = []
    for _ in range(repeat):
        started = time.process_time()
        call()
        times.append(time.process_time() - started)
    return min(times)


def fixed_loop() -> float:
    """Return the CPU seconds of LOOP small operators."""
    number, one = torch.zeros(1), torch.ones(1)

    def add() -> None:
        for _ in range(LOOP):
            number.add_(one)

    return cpu_seconds(add)


def tuned(name: str, dtype: torch.dtype = torch.bfloat16, **options: object) -> Backbone:
    """Return a backbone with a LoRA of rank 16 in train mode, on the CPU."""
    backbone = random_models.backbone(name, "cpu", dtype, **options)
    backbone.add_lora(16, 16.0)
    backbone.trunk.train()
    return backbone


class Step:
    """One pair through reference and policy and back, on a CPU, without data and optimiser.

    autocast: as a GPU's mixed precision has it, None without.
    """

    def __init__(self, name: str, backbone: Backbone, autocast: torch.dtype | None) -> None:
        self.backbone, self.autocast = backbone, autocast
        shape = (2, *random_models.latent_shape(name, random_models.MODELS[name].side))
        self.noisy, self.times = torch.randn(shape), torch.full((2,), 0.5)
        self.conditioning = {k: v.expand(2, *v.shape[1:]) for k, v in random_models.embeddings(name).items()}

    def __call__(self) -> None:
        """Take the step; gradients are left behind."""
        inputs = (self.noisy, self.times, self.conditioning)
        with torch.autocast("cpu", self.autocast, enabled=self.autocast is not None):
            with torch.no_grad(), self.backbone.role("reference"):
                reference = self.backbone.predict(*inputs)
            with self.backbone.role("policy"):
                policy = self.backbone.predict(*inputs)
            loss = (policy - reference + 1.0).square().mean()
        loss.backward()
        for weight in self.backbone.trainable().values():
            weight.grad = None


def role_switch(backbone: Backbone) -> float:
    """Return the CPU seconds of entering and leaving a role."""

    def switch() -> None:
        for role in ("reference", "policy") * 5:
            with backbone.role(role):
                pass

    return cpu_seconds(switch) / 10
