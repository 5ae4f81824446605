"""Gradient sums and metric sums for methods that do not use DDP.

Distillation trains two networks in turn, and a reward's gradient runs through several passes of one; wrapping a module for
several processes allows neither. So processes sum their gradients themselves: the loss is a sum over the step's images,
divided by their number, whatever the processes and micro-batches.
"""

import math

import torch
from accelerate import Accelerator
from torch import Tensor

from diffalign.config import OptimizerSection
from diffalign.training.finite import FiniteGuard
from diffalign.training.optim import build_optimizer, learning_rate, set_rate
from diffalign.training.protocols import Parameters


class MetricSums:
    """Metrics summed over micro-batches, then over processes; an unknown value (NaN) is left out of its mean."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def add(self, metrics: dict[str, Tensor], share: float = 1.0) -> None:
        """Add metrics, [N] each. share: how much of the step's mean these are, where several make it up."""
        for name, value in metrics.items():
            known = torch.isfinite(value)
            new = torch.stack([value.double().nan_to_num(0.0, 0.0, 0.0).sum(), known.double().sum()]) * share
            self.values[name] = self.values.get(name, torch.zeros_like(new)) + new

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the means by name, in the names' order: one reduction, one transfer."""
        names = sorted(self.values)
        # float32: not every device and backend sums doubles.
        totals = accelerator.reduce(torch.stack([self.values[n] for n in names]).float(), reduction="sum")
        return {name: (s / n if n else math.nan) for name, (s, n) in zip(names, totals.tolist(), strict=True)}


class Network:
    """A network that trains without DDP: its parameters, their optimiser, and gradients that processes sum themselves.

    steps: of the whole run, which the learning rate follows; name: of the network in errors, "" for the only one.
    """

    def __init__(
        self,
        parameters: Parameters,
        settings: OptimizerSection,
        steps: int,
        max_grad_norm: float,
        accelerator: Accelerator,
        finite: FiniteGuard,
        name: str = "",
    ) -> None:
        self.parameters, self.settings, self.steps, self.max_grad_norm = parameters, settings, steps, max_grad_norm
        self.accelerator, self.finite, self.name = accelerator, finite, name
        self.optimizer = build_optimizer(settings, parameters.values())

    def set_rate(self, step: int) -> float:
        """Set the learning rate of this step, and return it."""
        return set_rate(self.optimizer, learning_rate(self.settings, step, self.steps))

    def backward(self, step: int, names: list[str], losses: Tensor, count: int) -> None:
        """Add a micro-batch's part of the gradient of sum(losses) / count. names: of what the losses [N] belong to."""
        share = losses.sum() / count
        self.finite.loss(step, names, losses, share, f"{self.name} loss".strip())
        share.backward()

    def update(self, step: int) -> Tensor:
        """Sum the gradients over processes, scale them down to the limit, and take a step; return the norm that they had."""
        weights = [p for p in self.parameters.values() if p.grad is not None]
        if self.accelerator.num_processes > 1:
            flat = torch.cat([p.grad.flatten() for p in weights if p.grad is not None])
            summed = self.accelerator.reduce(flat, reduction="sum")
            for parameter, part in zip(weights, summed.split([p.numel() for p in weights]), strict=True):
                parameter.grad = part.view_as(parameter).clone()
        norm = torch.nn.utils.clip_grad_norm_(weights, self.max_grad_norm)
        self.finite.norm(step, [], norm, f"{self.name} gradient norm".strip())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm
