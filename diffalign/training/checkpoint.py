"""Checkpoints: everything an exact resume needs, in safetensors and JSON, written under another name and renamed.

checkpoints/step-00000100/  policy.safetensors, optimizer.safetensors, ema.safetensors (if kept), state.json
                            reference.safetensors (if the reference moves)
                            drawn.safetensors (if the next step trains on images that the run has drawn before)
A run that trains further networks (distillation: "fake") has NAME.safetensors and NAME_optimizer.safetensors of each.
"""

import errno
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypedDict

import torch
from safetensors.torch import save_file

from diffalign.config import RunConfig
from diffalign.errors import DiffalignError
from diffalign.training.average_decay import AverageDecay
from diffalign.training.checkpoint_files import checkpoints, damage, read_record, read_tensors, write_record
from diffalign.training.optimizer_state import optimizer_record, restore_optimizer
from diffalign.training.protocols import Parameters, PlainConfig, PlainRow, Weights
from diffalign.training.same_run import Resolved, changes, describe_changes, refuse_another_run
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


class Drawn(Protocol):
    """Images that a run has drawn and trains on for several steps."""

    def kept(self, step: int) -> Weights:
        """Return the tensors that a resume after `step` steps cannot draw again; none where the next step draws anew."""


@dataclass(frozen=True)
class TrainState:
    """Everything that training changes, and so what a checkpoint holds.

    ema: a second set of the policy's weights: their moving average where `decay` is set; a judge keeps the policy of its
    outer iteration there. reference: the weights of a reference that moves. drawn: images that the run has drawn itself.
    sharded: weights are cut over the processes, so all of them take part in saving. store: written before a checkpoint is.
    """

    policy: Parameters
    optimizer: torch.optim.Optimizer
    ema: Weights | None = None
    decay: AverageDecay | None = None
    scaler: torch.amp.GradScaler | None = None
    extra: Memory = field(default_factory=Memory)
    partners: dict[str, Partner] = field(default_factory=dict)
    sharded: bool = False
    store: Flushable | None = None
    reference: Parameters | None = None
    drawn: Drawn | None = None

    @property
    def average(self) -> Weights | None:
        """The moving average of the policy's weights, None where none is kept."""
        return self.ema if self.decay else None


@dataclass(frozen=True)
class About:
    """What a checkpoint says about its run.

    config: as the run writes it. resolved: what its keys stand for. rows: those of metrics.jsonl since the checkpoint before,
    so that a row that a crash tore can be written again. interim: a signal asked for it between the steps of
    checkpoint.every; the next checkpoint replaces it.
    """

    config: PlainConfig
    resolved: Resolved = field(default_factory=dict)
    rows: Sequence[PlainRow] = ()
    interim: bool = False

    def record(self) -> dict[str, Any]:
        """Return it as the checkpoint's record has it; its values are JSON."""
        return {
            "config": self.config,
            "resolved": dict(self.resolved),
            "rows": list(self.rows),
            "interim": self.interim,
        }


def _sync(folder: Path) -> None:
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def save_checkpoint(run_dir: Path, step: int, state: TrainState, about: About, keep: int, write: bool = True) -> Path:
    """Write step-N and drop interim ones and all but the newest `keep` others.

    A kill or a full disk leaves the earlier ones as they were. All processes call this, since each has its part of sharded
    weights; one of them has `write`. Raises DiffalignError for a full disk.
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
        **about.record(),
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
        if state.reference is not None:
            moving = {k: v.detach().cpu().contiguous() for k, v in state.reference.items()}
            save_file(moving, part / "reference.safetensors")
        if state.drawn is not None and (kept := state.drawn.kept(step)):
            save_file(kept, part / "drawn.safetensors")
        for name, partner in state.partners.items():
            own = {k: v.detach().cpu().contiguous() for k, v in partner.parameters.items()}
            save_file(own, part / f"{name}.safetensors")
            save_file(partners[name][0], part / f"{name}_optimizer.safetensors")
        write_record(part, record)
        _sync(part)
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
        _sync(folder)
    except Exception as error:  # whatever it is, no part of a checkpoint stays
        shutil.rmtree(part, ignore_errors=True)
        if not _is_full_disk(error):
            raise
        last = checkpoints(run_dir)
        raise DiffalignError(
            f"no space left on the disk of {run_dir} at step {step}; the last complete checkpoint is "
            f"{last[-1] if last else 'none'}: free some space and run the same command again"
        ) from error
    drop_old_checkpoints(run_dir, keep)
    return final


def _is_full_disk(error: Exception) -> bool:
    """Return whether a disk is full; safetensors reports that as an error of its own type with the system's words in it."""
    return (isinstance(error, OSError) and error.errno == errno.ENOSPC) or "No space left" in str(error)


def drop_old_checkpoints(run_dir: Path, keep: int) -> None:
    """Delete interim checkpoints but the newest of all, all but the newest `keep` others, and what a kill left unfinished.

    Also to be called when a run resumes: a kill may have come between the writing of a checkpoint and this.
    """
    earlier = checkpoints(run_dir)[:-1]
    interim = [path for path in earlier if _is_interim(path)]
    scheduled = [path for path in earlier if path not in interim]
    unfinished = (run_dir / "checkpoints").glob("step-*.part")
    for old in [*interim, *(scheduled[: -(keep - 1)] if keep > 1 else scheduled), *unfinished]:
        shutil.rmtree(old)


def _is_interim(path: Path) -> bool:
    """Return whether a checkpoint was made for a signal; a damaged one is kept as long as any other."""
    try:
        return bool(read_record(path).get("interim"))
    except DiffalignError:
        return False


def load_checkpoint(path: Path, state: TrainState, record: dict[str, Any]) -> None:
    """Put a checkpoint into policy, optimiser and average, in place; `record`: its state.json.

    Raises DiffalignError for one that cannot be read.
    """
    policy = read_tensors(path, record, "policy.safetensors", state.policy)
    tensors = read_tensors(path, record, "optimizer.safetensors")
    averages = read_tensors(path, record, "ema.safetensors", state.ema) if state.ema is not None else {}
    moving = {}
    if state.reference is not None:
        moving = read_tensors(path, record, "reference.safetensors", state.reference)
    images = state.drawn.kept(int(record["step"])) if state.drawn is not None else {}
    found = read_tensors(path, record, "drawn.safetensors", images) if images else {}
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
        for name, weight in (state.reference or {}).items():
            weight.copy_(moving[name])
        for name, values in images.items():
            values.copy_(found[name])
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


@dataclass(frozen=True)
class Resumed:
    """Where a run resumes. step: how many are done, 0 at the start; rows, interim: as in `About`; changed: a line to say."""

    step: int = 0
    rows: Sequence[PlainRow] = ()
    interim: bool = False
    changed: str | None = None


def check_before_loading(config: RunConfig, resolved: Resolved | None = None) -> None:
    """Refuse to resume a run of another config, before model and data are loaded; `resolved`: what is known by then.

    Raises DiffalignError that names what differs, and for more steps done than the config wants.
    """
    if saved := checkpoints(config.run_dir):
        _checked_record(saved[-1], config, resolved or {}, loaded=False)


def resume(config: RunConfig, state: TrainState, resolved: Resolved) -> Resumed:
    """Load the newest complete checkpoint into `state`, if there is one. Its config is compared before its tensors are read.

    Raises DiffalignError for a checkpoint of another config, for one that cannot be read, and for more steps done than wanted.
    """
    saved = checkpoints(config.run_dir)
    if not saved:
        return Resumed()
    record, changed = _checked_record(saved[-1], config, resolved, loaded=True)
    load_checkpoint(saved[-1], state, record)
    return Resumed(int(record["step"]), record.get("rows", ()), record.get("interim", False), changed)


def _checked_record(
    path: Path, config: RunConfig, resolved: Resolved, loaded: bool
) -> tuple[dict[str, Any], str | None]:
    """Return a checkpoint's state.json, and a line about what changed in the config without making it another run."""
    record = read_record(path)
    found = changes(record["config"], config, record.get("resolved", {}), resolved, loaded=loaded)
    refuse_another_run(path, found, config)
    if record["step"] > config.train.steps:
        raise DiffalignError(
            f"{config.run_dir} has {record['step']} steps already; train.steps={config.train.steps} would go back: choose "
            "another run_dir"
        )
    return record, describe_changes(found)
