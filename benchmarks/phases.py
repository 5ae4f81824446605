"""FLOPs and memory of one training step, cut into inversion, reference, policy, backward and update, while it runs.

The cuts are where the trunk's forward begins and ends and where the optimiser steps, so that the loop itself is measured and
not a copy of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.flop_counter import FlopCounterMode

from diffalign.training.footprint import LiveBytes


@dataclass
class Phases:
    """flops and peak bytes by phase, once `measured` has ended."""

    cuda: bool
    flops: dict[str, int] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    without_gradient: int = 0
    """Forwards of a trunk under no_grad."""
    _counter: FlopCounterMode | None = None
    _live: LiveBytes | None = None
    _seen: int = 0

    def _close(self, phase: str) -> None:
        """What happened since the last cut belongs to `phase`."""
        if self._counter is not None:
            total = self._counter.get_total_flops()
            self.flops[phase] = self.flops.get(phase, 0) + total - self._seen
            self._seen = total
        peak = 0
        if self.cuda:
            peak = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        elif self._live is not None:
            peak, self._live.peak = self._live.peak, self._live.now
        self.peaks[phase] = max(peak, self.peaks.get(phase, 0))

    def _ran(self, *_: Any) -> None:
        self.without_gradient += not torch.is_grad_enabled()
        self._close("policy" if torch.is_grad_enabled() else "reference")

    @contextmanager
    def measured(self, trunks: list[nn.Module], *, count: bool = True) -> Iterator[None]:
        """Measure a single step. Memory: what CUDA's allocator holds; elsewhere what operators made within the block.
        count=False leaves out FLOPs, whose counting disturbs the allocator."""
        with ExitStack() as stack:
            if not self.cuda:
                self._live = stack.enter_context(LiveBytes())
            if count:
                self._counter = stack.enter_context(FlopCounterMode(display=False))
            hooks = [trunk.register_forward_hook(self._ran) for trunk in trunks]
            hooks += [trunk.register_forward_pre_hook(lambda *_: self._close("other")) for trunk in trunks]
            hooks.append(register_optimizer_step_pre_hook(lambda *_: self._close("backward")))
            hooks.append(register_optimizer_step_post_hook(lambda *_: self._close("update")))
            try:
                yield
                self._close("other")
            finally:
                for hook in hooks:
                    hook.remove()

    def split(self, references: int) -> dict[str, int]:
        """FLOPs by phase, with the forwards of an inversion apart from the `references` forwards of the reference."""
        inverted = self.without_gradient - references
        if inverted <= 0:
            return dict(self.flops)
        one = self.flops["reference"] // self.without_gradient
        return {**self.flops, "reference": one * references, "inversion": one * inverted}
