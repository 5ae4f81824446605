"""Optimisers by name, and the learning rate as a function of the step, so that it needs no state to resume."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from diffalign.config import OptimizerSection
from diffalign.packages import require
from diffalign.training.offload import OffloadedAdamW


def check_installed(settings: OptimizerSection) -> None:
    """Raise DiffalignError where the optimiser needs a package that is absent, before anything is loaded."""
    if settings.name == "adamw8bit":
        require("bitsandbytes", "optimizer.name=adamw8bit")


def build_optimizer(settings: OptimizerSection, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Build the optimiser that a config's `optimizer` section names. Its learning rate is set before every step."""
    parameters = list(parameters)
    adam: dict[str, Any] = {
        "lr": settings.lr,
        "betas": tuple(settings.betas),
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }
    if settings.name == "adamw" and settings.offload:
        return OffloadedAdamW(parameters, **adam)
    if settings.name == "adamw":
        # One kernel for all tensors: a LoRA has hundreds of small ones.
        return torch.optim.AdamW(parameters, **adam, fused=True)
    if settings.name == "adamw8bit":
        check_installed(settings)
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, **adam)
    # transformers' Adafactor with an external rate, as the Diffusion-DPO authors train SDXL; torch.optim.Adafactor
    # has other update rules.
    from transformers.optimization import Adafactor

    return Adafactor(
        parameters,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        relative_step=False,
        scale_parameter=False,
        warmup_init=False,
    )


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> float:
    """Set the learning rate of all parameters, and return it."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def learning_rate(settings: OptimizerSection, step: int, steps: int) -> float:
    """Return the rate of step 0..steps-1: linear warm-up, then constant, or linear or cosine to 0 at `steps`."""
    warmup = settings.warmup_steps
    if step < warmup:
        return float(settings.lr * (step + 1) / warmup)
    progress = (step - warmup) / max(1, steps - warmup)
    factor = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[settings.schedule]
    return float(settings.lr * factor)
