"""What the loops whose networks are not wrapped share: summed metrics, summed gradients, an update, a check of numbers.

Distillation trains two networks in turn, and a reward's gradient runs through several passes of one; wrapping a module for
several processes allows neither. So processes sum their gradients themselves: the loss is a sum over the step's images, divided
by their number, whatever the processes and micro-batches.
"""

import math
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffalign.errors import DiffalignError
from diffalign.training.checkpoint import checkpoints

Parameters = dict[str, nn.Parameter]


class Sums:
    """Metrics summed over micro-batches, then over processes; an unknown value (NaN) is left out of its mean."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def add(self, metrics: dict[str, Tensor], share: float = 1.0) -> None:
        """metrics: [N] each. `share`: how much of the step's mean this is, where several add up to it."""
        for name, value in metrics.items():
            known = torch.isfinite(value)
            new = torch.stack([value.double().nan_to_num(0.0, 0.0, 0.0).sum(), known.double().sum()]) * share
            self.values[name] = self.values.get(name, torch.zeros_like(new)) + new

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        names = sorted(self.values)
        # float32: not every device and backend sums doubles.
        totals = accelerator.reduce(torch.stack([self.values[n] for n in names]).float(), reduction="sum")
        return {name: (s / n if n else math.nan) for name, (s, n) in zip(names, totals.tolist(), strict=True)}


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> float:
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def update(
    accelerator: Accelerator,
    parameters: Parameters,
    optimizer: torch.optim.Optimizer,
    config: Any,
    step: int,
    run_dir: Path,
    remedy: str,
) -> float:
    """Sum the gradients over processes, cut them to size, and take a step; returns their norm."""
    weights = [p for p in parameters.values() if p.grad is not None]
    if accelerator.num_processes > 1:
        flat = torch.cat([p.grad.flatten() for p in weights if p.grad is not None])
        summed = accelerator.reduce(flat, reduction="sum")
        for parameter, part in zip(weights, summed.split([p.numel() for p in weights]), strict=True):
            parameter.grad = part.view_as(parameter).clone()
    norm = torch.nn.utils.clip_grad_norm_(weights, config.train.max_grad_norm)
    check_finite("gradient norm", norm, step, [], run_dir, remedy)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(norm)


def check_finite(what: str, value: Tensor, step: int, ids: list[str], run_dir: Path, remedy: str) -> None:
    """Raise DiffalignError for a number that is not finite, with the last good checkpoint and the `remedy`."""
    if torch.isfinite(value):
        return
    saved = checkpoints(run_dir)
    where = f", prompts {', '.join(ids)}" if ids else ""
    raise DiffalignError(
        f"the {what} is {float(value.detach())} at step {step + 1}{where}; the last good checkpoint is "
        f"{saved[-1] if saved else 'none'}: {remedy}"
    )
