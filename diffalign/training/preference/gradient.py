"""The gradient of one step: its micro-batches, forward and backward."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from diffalign.errors import DiffalignError
from diffalign.objectives import Objective
from diffalign.training.device import sent
from diffalign.training.finite import Reading
from diffalign.training.preference.posterior import with_samples
from diffalign.training.preference.reference_store import ReferenceStore, live
from diffalign.training.preference.selection import Selection
from diffalign.training.preference.step import StepOutput, make_draws, preference_step

STORED_MARGIN = 0.05
"""How far beta |d| may lie from 0 before the first update where the reference was computed by another run."""

GPU_ROUNDING = 1e-3
"""How far errors may differ, relative to the largest, where kernels choose the order of their sums."""


@dataclass
class StepGradient:
    """Gradients of a step into `policy`, whatever the processes and micro-batches.

    slots: the groups of a step that are this process's, cut into micro-batches of `micro`. images_per_pass: how many images
    go through the model at a time; it falls to 1 by itself where a GPU's memory does not hold them.
    """

    config: Any
    backbone: Any
    source: Any
    selection: Selection
    accelerator: Accelerator
    module: nn.Module
    policy: dict[str, nn.Parameter]
    slots: range
    micro: int
    reading: Reading
    store: ReferenceStore | None
    same_at_start: bool
    say: Callable[[str], None]
    images_per_pass: int | None
    drawing: float = 0.0

    @property
    def waited(self) -> float:
        """Seconds so far in which groups were read and drawn, or kept numbers read, and nothing else was done."""
        return self.drawing + (self.store.waited if self.store else 0.0)

    def __call__(self, step: int, indices: list[int], objective: Objective) -> dict[str, Tensor]:
        """Sums over this process's micro-batches of what is logged; `indices` are the groups of the step."""
        while True:
            try:
                return self._accumulated(step, indices, objective)
            except torch.OutOfMemoryError as error:
                reason = str(error).split(". ")[0]
            # Here the error is gone, and with it what its traceback held on to.
            self._make_room(step, reason)

    def _accumulated(self, step: int, indices: list[int], objective: Objective) -> dict[str, Tensor]:
        totals: dict[str, Tensor] = {}
        # Passes go through the bare trunk, and the gradients are averaged afterwards: DDP wants one forward a backward.
        module = self.module if self.images_per_pass is None else None
        starts = self.slots[:: self.micro]
        for start in starts:
            slots = list(range(start, start + self.micro))
            began = time.monotonic()
            batch = with_samples(self.config, self.source.batch([indices[s] for s in slots]), step, slots)
            draws = make_draws(self.config, self.backbone.process, step, slots, batch.group_ids, batch.latents.shape)
            draws = self.selection.narrow(draws, batch.rewards, step, slots, batch.group_ids)
            self.drawing += time.monotonic() - began
            counts = sent(self.selection.weights[[indices[s] for s in slots]], self.backbone.device)
            with nullcontext() if start == starts[-1] else self.accelerator.no_sync(self.module):
                with self.accelerator.autocast():
                    result = preference_step(
                        self.config,
                        objective,
                        self.backbone,
                        batch,
                        draws,
                        self.source.unconditional,
                        module,
                        recall=self.store.recall(step, start) if self.store else live,
                        images_per_pass=self.images_per_pass,
                    )
                share = (counts * result.weight * result.output.loss).sum() / self.config.train.groups_per_step
                if step == 0 and self.same_at_start:
                    _check_margin(result, objective if self.store and self.store.holds(step, start) else None)
                self.reading.loss(step, batch.group_ids, result.output.loss, share)
                # DDP averages gradients over processes; the step's loss is their sum.
                self.accelerator.backward(share * self.accelerator.num_processes)
            _add(totals, result, share)
        if module is None and isinstance(self.module, DistributedDataParallel):
            for parameter in self.policy.values():
                if parameter.grad is not None:
                    parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean")
        return totals

    def _make_room(self, step: int, reason: str) -> None:
        """Go on with one image at a time. The step begins anew, and its gradient is the same."""
        if self.images_per_pass == 1:
            raise DiffalignError(
                f"step {step + 1}: not even one image fits into the GPU's memory ({reason}); set "
                "model.gradient_checkpointing=true, model.dtype=bfloat16, or a smaller data.resolution"
            )
        if self.accelerator.num_processes > 1:
            # The others wait for this one's gradients already, and cannot begin anew.
            raise DiffalignError(
                f"step {step + 1}: the images of {self.micro} groups do not fit into the GPU's memory ({reason}); set "
                "train.images_per_pass=1 and run the same command again"
            )
        self.images_per_pass = 1
        self.say(
            f"step {step + 1}: the images of {self.micro} groups do not fit into the GPU's memory; from here on one image at a "
            "time, with the same gradient (train.images_per_pass=1 begins so)"
        )
        for parameter in self.policy.values():
            parameter.grad = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _check_margin(result: StepOutput, stored: Any = None) -> None:
    """Policy = reference by construction before the first update, so every error must agree: on a CPU to the last bit, on a
    GPU, whose kernels may add up in another order with gradients than without, to rounding.

    `stored`: the objective, where the reference is another run's: another device's or version's last bits may differ, but
    beta |d| stays small.
    """
    errors = result.errors
    if errors.reference_error is None:
        return
    difference = float((errors.policy_error - errors.reference_error).abs().max().detach())
    if stored is not None and stored.beta * difference <= STORED_MARGIN:
        return
    if stored is not None:
        raise DiffalignError(
            f"reference.store: before the first update beta times the difference of policy and stored reference is "
            f"{stored.beta * difference:.3g}, and at most {STORED_MARGIN} is rounding; delete the store, which belongs to "
            "another model or data"
        )
    on_cpu = errors.policy_error.device.type == "cpu"
    if difference > (0.0 if on_cpu else GPU_ROUNDING * float(errors.reference_error.abs().max())):
        raise DiffalignError(
            f"before the first update policy and reference differ by {difference:.3g} in their error, but must be equal: "
            "something other than the policy's weights changes between the two forward passes"
        )


def _add(totals: dict[str, Tensor], result: StepOutput, share: Tensor) -> None:
    """Sums of a micro-batch: metrics over groups that count, and how many these are."""
    new = {name: (result.weight * value).sum() for name, value in result.metrics.items()}
    new |= {"loss": share.detach(), "_count": result.weight.sum(), "_groups": torch.ones_like(result.weight).sum()}
    for name, value in new.items():
        totals[name] = totals.get(name, torch.zeros_like(value)) + value


def logged(accelerator: Accelerator, totals: dict[str, Tensor]) -> dict[str, float]:
    """Global means of what `StepGradient` returns: one reduction, one transfer."""
    names = sorted(totals)
    values = accelerator.reduce(torch.stack([totals[n].float() for n in names]), reduction="sum")
    row = dict(zip(names, values.tolist(), strict=True))
    count, groups = row.pop("_count"), row.pop("_groups")
    found = {name: value if name == "loss" else value / max(count, 1.0) for name, value in row.items()}
    return found | {"share_without_preference": 1.0 - count / groups}
