"""The gradient of one preference step: its micro-batches, forward and backward."""

import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from diffalign.config import TrainConfig
from diffalign.errors import DiffalignError
from diffalign.objectives import Objective
from diffalign.pipelines import Backbone
from diffalign.training.device import Share, to_device
from diffalign.training.finite import FiniteGuard
from diffalign.training.preference.disagreement import within_halves
from diffalign.training.preference.draws import make_draws
from diffalign.training.preference.posterior import with_samples
from diffalign.training.preference.reference_store import ReferenceStore, live
from diffalign.training.preference.selection import Selection
from diffalign.training.preference.step import PreferenceOutput, preference_step
from diffalign.training.protocols import GroupSource, Parameters, Say

STORED_MARGIN = 0.05
"""How far beta |d| may lie from 0 before the first update where the reference was computed by another run."""

GPU_ROUNDING = 1e-3
"""How far errors may differ, relative to the largest, where kernels choose the order of their sums."""


@runtime_checkable
class HasBeta(Protocol):
    """An objective whose tie to the reference has a strength."""

    @property
    def beta(self) -> float: ...


@dataclass
class StepGradient:
    """Gradients of a step into `policy`, whatever the processes and micro-batches.

    share: this process's part of a step. images_per_pass: how many images go through the model at a time; it falls to 1 by
    itself where a GPU's memory does not hold them. same_at_start: the policy equals the reference before the first update.
    """

    config: TrainConfig
    backbone: Backbone
    source: GroupSource
    selection: Selection
    accelerator: Accelerator
    module: nn.Module
    policy: Parameters
    share: Share
    finite: FiniteGuard
    store: ReferenceStore | None
    same_at_start: bool
    say: Say
    images_per_pass: int | None
    drawing: float = 0.0

    @property
    def waited(self) -> float:
        """Seconds so far in which groups were read and drawn, or the store was read, and nothing else was done."""
        return self.drawing + (self.store.waited if self.store else 0.0)

    def __call__(self, step: int, indices: list[int], objective: Objective) -> dict[str, Tensor]:
        """Compute the gradient of the groups `indices`; return sums over this process's micro-batches of what is logged."""
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
        micro_batches = self.share.micro_batches()
        for slots in micro_batches:
            # ---- Groups and everything random about them; the time that nothing else is done in ----
            began, first = time.monotonic(), slots[0]
            batch = with_samples(self.config, self.source.batch([indices[s] for s in slots]), step, slots)
            draws = make_draws(
                self.config, self.backbone.process, step, slots, batch.group_ids, batch.latents.shape,
                batch.rewards.isfinite(), batch.seeds if self.config.noise == "tracked" else None,
                batch.paths.steps.times if batch.paths else None,
            )  # fmt: skip
            draws = self.selection.narrow(draws, batch.rewards, step, slots, batch.group_ids)
            self.drawing += time.monotonic() - began
            counts = to_device(self.selection.weights[[indices[s] for s in slots]], self.backbone.device)

            # ---- Forward and backward; processes exchange gradients after the last micro-batch only ----
            with nullcontext() if slots is micro_batches[-1] else self.accelerator.no_sync(self.module):
                with self.accelerator.autocast():
                    result = preference_step(
                        self.config,
                        objective,
                        self.backbone,
                        batch,
                        draws,
                        self.source.unconditional,
                        module,
                        recall=self.store.recall(step, first) if self.store else live,
                        images_per_pass=self.images_per_pass,
                    )
                share = (counts * result.weight * result.output.loss).sum() / self.config.train.groups_per_step
                if step == 0 and self.same_at_start:
                    stored = self.store is not None and self.store.holds(step, first)
                    _check_margin(result, objective.beta if stored and isinstance(objective, HasBeta) else None)
                self.finite.loss(step, batch.group_ids, result.output.loss, share)
                # DDP averages gradients over processes; the step's loss is their sum.
                self.accelerator.backward(share * self.accelerator.num_processes)
            _add(totals, result, share)
        if module is None and isinstance(self.module, DistributedDataParallel):
            for parameter in self.policy.values():
                if parameter.grad is not None:
                    parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean")
        return totals

    def _make_room(self, step: int, reason: str) -> None:
        """Prepare to retry the step in less memory; the gradient does not change.

        First blocks keep only their inputs, if `model.gradient_checkpointing` may be chosen; then images go one at a time.
        """
        checkpoints = self.config.model.gradient_checkpointing == "auto" and self.backbone.checkpointing is not True
        if checkpoints and self.accelerator.num_processes == 1:
            self.backbone.checkpoint(True)
            self._retry(step, "with gradient checkpointing", "model.gradient_checkpointing=true")
            return
        if self.images_per_pass == 1:
            raise DiffalignError(
                f"step {step + 1}: not even one image fits into the GPU's memory ({reason}); set "
                "model.gradient_checkpointing=true, model.dtype=bfloat16, or a smaller data.resolution"
            )
        if self.accelerator.num_processes > 1:
            # The others wait for this one's gradients already, and cannot retry.
            raise DiffalignError(
                f"step {step + 1}: the images of {self.share.micro} groups do not fit into the GPU's memory ({reason}); set "
                f"{'model.gradient_checkpointing=true' if checkpoints else 'train.images_per_pass=1'} and run the same "
                "command again"
            )
        self.images_per_pass = 1
        self._retry(step, "one image at a time", "train.images_per_pass=1")

    def _retry(self, step: int, how: str, key: str) -> None:
        self.say(
            f"step {step + 1}: the images of {self.share.micro} groups do not fit into the GPU's memory; from here on {how}, "
            f"with the same gradient ({key} begins so)"
        )
        for parameter in self.policy.values():
            parameter.grad = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _check_margin(result: PreferenceOutput, stored_beta: float | None) -> None:
    """Refuse a policy that differs from the reference before the first update, where both are equal by construction.

    Every error must agree: on a CPU to the last bit, on a GPU, whose kernels may add up in another order with gradients than
    without, to rounding. stored_beta: the objective's beta where the reference is another run's: another device's or
    version's last bits may differ, but beta |d| stays small.
    """
    errors = result.errors
    if errors.reference_error is None:
        return
    difference = float((errors.policy_error - errors.reference_error).abs().max().detach())
    if stored_beta is not None:
        if stored_beta * difference > STORED_MARGIN:
            raise DiffalignError(
                f"reference.store: before the first update beta times the difference of policy and stored reference is "
                f"{stored_beta * difference:.3g}, and at most {STORED_MARGIN} is rounding; delete the store, which belongs to "
                "another model or data"
            )
        return
    on_cpu = errors.policy_error.device.type == "cpu"
    if difference > (0.0 if on_cpu else GPU_ROUNDING * float(errors.reference_error.abs().max())):
        raise DiffalignError(
            f"before the first update policy and reference differ by {difference:.3g} in their error, but must be equal: "
            "something other than the policy's weights changes between the two forward passes"
        )


def _add(totals: dict[str, Tensor], result: PreferenceOutput, share: Tensor) -> None:
    """Add a micro-batch to the sums: metrics over groups that count, and how many these are."""
    new = {name: (result.weight * value).sum() for name, value in result.metrics.items()}
    new |= {"loss": share.detach(), "_count": result.weight.sum(), "_groups": torch.ones_like(result.weight).sum()}
    for name, value in new.items():
        totals[name] = totals.get(name, torch.zeros_like(value)) + value


def logged(accelerator: Accelerator, totals: dict[str, Tensor]) -> dict[str, float]:
    """Return global means of what `StepGradient` returns: one reduction, one transfer."""
    names = sorted(totals)
    values = accelerator.reduce(torch.stack([totals[n].float() for n in names]), reduction="sum")
    row = dict(zip(names, values.tolist(), strict=True))
    count, groups = row.pop("_count"), row.pop("_groups")
    found = {name: value if name == "loss" else value / max(count, 1.0) for name, value in row.items()}
    return (within_halves(found) if count else found) | {"share_without_preference": 1.0 - count / groups}
