"""Checkpoints: everything an exact resume needs, in safetensors and JSON, written under another name and renamed.

checkpoints/step-00000100/  policy.safetensors, optimizer.safetensors, ema.safetensors (if kept), state.json
A run that trains further networks (distillation: "fake") has NAME.safetensors and NAME_optimizer.safetensors of each.
"""

import errno
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypedDict

import torch
from safetensors.torch import save_file

from diffalign.errors import DiffalignError
from diffalign.training.checkpoint_files import checkpoints, damage, read_record, read_tensors, write_record
from diffalign.training.optimizer_state import optimizer_record, restore_optimizer
from diffalign.training.protocols import Parameters, PlainConfig, Weights
from diffalign.training.same_run import check_same_run
from diffalign.training.sharding import placed, whole


@dataclass(frozen=True)
class Partner:
    """A further network that trains, and its optimiser."""

    parameters: Parameters
    optimizer: torch.optim.Optimizer


class Memory(TypedDict, total=False):
    """Plain numbers that a method remembers from step to step (`preference/stabilise.py`)."""

    usual_norms: list[float]
    margin_size: float
    margin_count: int


class Flushable(Protocol):
    """A store that a run fills beside its checkpoints, and that may not lag behind them."""

    def flush(self) -> None:
        """Write what has gathered since the last time."""


@dataclass(frozen=True)
class TrainState:
    """Everything that training changes, and so what a checkpoint holds.

    ema: a second set of the policy's weights: their moving average where `ema_decay` is set; a judge keeps the policy of its
    outer iteration there. sharded: weights are cut over the processes, so all of them take part in saving. store: written
    before a checkpoint is.
    """

    policy: Parameters
    optimizer: torch.optim.Optimizer
    ema: Weights | None = None
    ema_decay: float | None = None
    scaler: torch.amp.GradScaler | None = None
    extra: Memory = field(default_factory=Memory)
    partners: dict[str, Partner] = field(default_factory=dict)
    sharded: bool = False
    store: Flushable | None = None

    @property
    def average(self) -> Weights | None:
        """The moving average of the policy's weights, None where none is kept."""
        return self.ema if self.ema_decay else None


def _sync(folder: Path) -> None:
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def save_checkpoint(
    run_dir: Path, step: int, state: TrainState, config: PlainConfig, keep: int, write: bool = True
) -> Path:
    """Write step-N and drop all but the newest `keep`. A kill or a full disk leaves the earlier ones as they were.

    All processes call this, since each has its part of sharded weights; one of them has `write`. Raises DiffalignError for a
    full disk.
    """
    folder = run_dir / "checkpoints"
    final, part = folder / f"step-{step:08d}", folder / f"step-{step:08d}.part"
    if state.store is not None:
        state.store.flush()
    if not (write or state.sharded):
        return final
    tensors, optimizer = optimizer_record(state.optimizer)
    partners = {name: optimizer_record(partner.optimizer) for name, partner in state.partners.items()}
    policy = {k: whole(v).detach().cpu().contiguous() for k, v in state.policy.items()}
    averages = {k: whole(v).cpu().contiguous() for k, v in (state.ema or {}).items()}
    if not write:
        return final
    record = {
        "step": step,
        "config": config,
        "optimizer": optimizer,
        "scaler": state.scaler.state_dict() if state.scaler is not None else None,
        "extra": state.extra,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    if partners:
        record["partners"] = {name: plain for name, (_, plain) in partners.items()}
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        save_file(policy, part / "policy.safetensors")
        save_file(tensors, part / "optimizer.safetensors")
        if state.ema is not None:
            save_file(averages, part / "ema.safetensors")
        for name, partner in state.partners.items():
            own = {k: v.detach().cpu().contiguous() for k, v in partner.parameters.items()}
            save_file(own, part / f"{name}.safetensors")
            save_file(partners[name][0], part / f"{name}_optimizer.safetensors")
        write_record(part, record)
        _sync(part)
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
        _sync(folder)
    except Exception as error:
        shutil.rmtree(part, ignore_errors=True)
        # safetensors reports a full disk as an error of its own type with the system's words in it.
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        if not full:
            raise
        last = checkpoints(run_dir)
        raise DiffalignError(
            f"no space left on the disk of {run_dir} at step {step}; the last complete checkpoint is "
            f"{last[-1] if last else 'none'}: free some space and run the same command again"
        ) from error
    for old in checkpoints(run_dir)[:-keep]:
        shutil.rmtree(old)
    return final


def load_checkpoint(path: Path, state: TrainState, config: PlainConfig) -> int:
    """Put a checkpoint into policy, optimiser and average, in place; return its step.

    Raises DiffalignError for one that cannot be read, and for one of another config.
    """
    record = read_record(path)
    check_same_run(path, record["config"], config)
    policy = read_tensors(path, record, "policy.safetensors", state.policy)
    tensors = read_tensors(path, record, "optimizer.safetensors")
    averages = read_tensors(path, record, "ema.safetensors", state.ema) if state.ema is not None else {}
    others = {
        name: (
            read_tensors(path, record, f"{name}.safetensors", partner.parameters),
            read_tensors(path, record, f"{name}_optimizer.safetensors"),
        )
        for name, partner in state.partners.items()
    }
    with torch.no_grad():
        for name, parameter in state.policy.items():
            parameter.copy_(placed(policy[name], parameter))
        for name, average in (state.ema or {}).items():
            average.copy_(placed(averages[name], average))
        for name, partner in state.partners.items():
            for key, parameter in partner.parameters.items():
                parameter.copy_(others[name][0][key])
    with damage(path):
        restore_optimizer(state.optimizer, tensors, record["optimizer"])
        for name, partner in state.partners.items():
            restore_optimizer(partner.optimizer, others[name][1], record["partners"][name])
        state.extra.update(record.get("extra", {}))
    if state.scaler is not None and record["scaler"]:
        state.scaler.load_state_dict(record["scaler"])
    return int(record["step"])


def resume(run_dir: Path, state: TrainState, config: PlainConfig, steps: int) -> int:
    """Load the newest complete checkpoint into `state`; return how many steps are done, 0 without one.

    Raises DiffalignError for a checkpoint of another config, for one that cannot be read, and for more than `steps` steps.
    """
    saved = checkpoints(run_dir)
    done = load_checkpoint(saved[-1], state, config) if saved else 0
    if done > steps:
        raise DiffalignError(
            f"{run_dir} has {done} steps already; train.steps={steps} would go back: choose another run_dir"
        )
    return done
