"""One step of the training loop as a call, for benchmarks that take turns: all of it but writing the row of metrics."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from diffalign.training.device import Share
from diffalign.training.finite import FiniteGuard
from diffalign.training.preference.gradient import StepGradient, logged
from diffalign.training.preference.policy import build_objective
from diffalign.training.preference.reference_key import open_store
from diffalign.training.preference.selection import Selection


def stepping(
    config: Any, backbone: Any, source: Any, optimizer: torch.optim.Optimizer, accelerator: Accelerator, folder: Path
) -> Callable[[int], None]:
    """Step number n of a TrainConfig on a backbone that is made trainable already. `folder` takes what is reported of losses
    that are not finite."""
    groups, micro = config.train.groups_per_step, config.train.micro_batch
    objective, parameters = build_objective(config.objective), backbone.trainable()
    store = open_store(config, source, backbone, objective, accelerator, micro, print)
    selection = Selection.of(config, source)
    gradient = StepGradient(
        config, backbone, source, selection, accelerator, backbone.trunk, parameters, Share(range(groups), micro),
        FiniteGuard(backbone.device, folder, "groups", "lower optimizer.lr"), store, False, print, config.train.images_per_pass,
    )  # fmt: skip

    def step(number: int) -> None:
        totals = gradient(number, selection.groups(number), objective)
        norm = accelerator.clip_grad_norm_(parameters.values(), config.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        logged(accelerator, totals)
        float(norm)
        if store:
            store.flush()

    return step
