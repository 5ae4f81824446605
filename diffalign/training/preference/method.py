"""The training loop, from top to bottom.

One optimiser step: `groups_per_step` groups are drawn by a seeded order, cut over processes and micro-batches, and

    loss of the step = sum over its groups of weight * loss / groups_per_step

so neither accumulation nor the number of processes can change it. The same command run again goes on from the newest
complete checkpoint, bit for bit on the same machine.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.health import Finding
from diffalign.objectives import Objective
from diffalign.training.checkpoint import TrainState, checkpoints, load_checkpoint, save_checkpoint
from diffalign.training.finite import Reading
from diffalign.training.health import Oversight
from diffalign.training.optim import build_optimizer, learning_rate
from diffalign.training.order import check_units
from diffalign.training.pace import Pace
from diffalign.training.preference.gradient import StepGradient, logged
from diffalign.training.preference.reference_key import open_store
from diffalign.training.preference.selection import Selection
from diffalign.training.preference.stabilise import is_freak, remember_margin, with_auto_beta
from diffalign.training.progress import TrainProgress
from diffalign.training.run_dir import open_run_dir
from diffalign.training.sharding import save_sharded, shard, whole
from diffalign.training.tracking import Metrics
from diffalign.training.validation import Validation, ValidationLog, averaged, best_of, score_of

Say = Callable[[str], None]


@dataclass(frozen=True)
class TrainResult:
    """run_dir/weights holds the trained weights after `step` steps; metrics are those of the last logged step."""

    run_dir: Path
    step: int
    metrics: dict[str, float]


def build_objective(section: Any) -> Objective:
    """The objective that a config's `objective` section names."""
    objective: Objective = section.build()
    return objective


def start_accelerator(config: Any) -> Accelerator:
    """accelerate's view of device and processes, checked against what the launcher started."""
    cpu = config.device == "cpu" or not torch.cuda.is_available()
    precision = config.train.mixed_precision
    if precision == "auto":
        precision = "no" if cpu else "bf16"
    accelerator = Accelerator(mixed_precision=precision, cpu=cpu)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        # Otherwise each process would believe it is alone, and all would write the same files.
        raise DiffalignError(
            f"{launched} processes were launched, but accelerate sees {accelerator.num_processes}; on a machine without a GPU "
            "set ACCELERATE_USE_CPU=true and launch with torchrun"
        )
    return accelerator


def prepare_policy(config: Any, backbone: Any, objective: Objective) -> bool:
    """Make the policy trainable; returns whether it equals the reference by construction."""
    tune = config.tune
    if tune.kind == "lora":
        own = tune.reference == "init"
        backbone.add_lora(
            tune.rank, tune.alpha, targets=tune.targets, seed=config.seed, init=tune.init, init_is_reference=own
        )
        same = own or tune.init is None
    else:
        backbone.enable_full(keep_reference=objective.needs_reference)
        # The policy trains in float32; a reference kept in half precision rounds differently.
        same = bool(backbone.dtype == torch.float32)
    if config.train.shard == "fsdp2":
        shard(backbone)
    if config.model.compile:
        backbone.compile_blocks(dynamic=config.data.buckets != "none")
        # Graphs with and without gradient may round differently in 16 bits.
        return False
    return same


def train(
    config: Any,
    *,
    backbone: Any,
    source: Any,
    say: Say = print,
    accelerator: Accelerator | None = None,
    validation: Validation | None = None,
    known: Sequence[Finding] = (),
) -> TrainResult:
    """Train `backbone` on `source` as `config` (a TrainConfig) says; writes everything into `config.run_dir`.

    `source` offers `len(source)`, `batch(indices)`, `unconditional` and `buckets`, a number for each group
    (`diffalign.data.training_source.TrainingSource`), and `rewards` and `mask` of all groups where `selection` chooses by them.
    `known`: what is wrong with the data already. Raises DiffalignError for a checkpoint of another config, for losses that
    are not finite, for a full disk, and for an alarm where on_alarm is stop.
    """
    # ---- Set-up ------------------------------------------------------------------------------------------------------
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    accelerator = accelerator or start_accelerator(config)
    main = accelerator.is_main_process
    run_dir, steps = Path(config.run_dir), config.train.steps
    objective = build_objective(config.objective)
    selection = Selection.of(config, source)
    per_process, rest = divmod(config.train.groups_per_step, accelerator.num_processes)
    if rest or per_process % min(config.train.micro_batch, per_process):
        raise DiffalignError(
            f"train.groups_per_step={config.train.groups_per_step} cannot be cut into micro-batches of "
            f"{config.train.micro_batch} groups over {accelerator.num_processes} processes; make it a multiple of their product"
        )
    micro = min(config.train.micro_batch, per_process)
    check_units(source.buckets, config.train.micro_batch, micro)
    store = open_store(config, source, backbone, objective, accelerator, micro)
    if main and store is not None:
        lacks = "; the drift metric needs reference.keep=predictions" if config.reference.errors_only else ""
        say(
            f"reference.store {store.folder}: {store.count()} micro-batches are there, others are computed and kept{lacks}"
        )
    same_at_start = prepare_policy(config, backbone, objective)
    backbone.trunk.train()
    policy = backbone.trainable()
    optimizer = build_optimizer(config.optimizer, policy.values())
    ema = {k: p.detach().clone() for k, p in policy.items()} if config.train.ema_decay else None
    state = TrainState(0, policy, optimizer, ema, accelerator.scaler)
    plain_config = config.model_dump(mode="json", exclude={"model": {"token"}})

    # ---- Resume ------------------------------------------------------------------------------------------------------
    saved = checkpoints(run_dir)
    first = load_checkpoint(saved[-1], state, plain_config) if saved else 0
    if first > steps:
        raise DiffalignError(
            f"{run_dir} has {first} steps already; train.steps={steps} would go back: choose another run_dir"
        )
    if first and main:
        say(f"going on from {saved[-1]}")
    # Weights that are cut over processes average their gradients themselves.
    sharded = config.train.shard == "fsdp2"
    module, optimizer = (backbone.trunk, optimizer) if sharded else accelerator.prepare(backbone.trunk, optimizer)
    metrics_log = None
    if main:
        open_run_dir(run_dir, plain_config)
        tracking = config.tracking
        metrics_log = Metrics(run_dir, tracking.trackers, tracking.project, plain_config, first)
    oversight = Oversight(run_dir, config.on_alarm, known, first, say, main)
    validations = ValidationLog(run_dir, first, main) if validation else None
    patience = config.validation.patience
    if validation and validations and not validations.rows:
        validate(validation, validations, oversight, accelerator, backbone, run_dir, 0)
    idle = best_of(validations.rows)[1] if validations else 0
    if patience and idle >= patience:
        steps = first
    row: dict[str, float] = {}
    reading, pace = Reading(accelerator.device, run_dir), Pace()
    gradient = StepGradient(
        config, backbone, source, selection, accelerator, module, policy,
        slots=range(accelerator.process_index * per_process, (accelerator.process_index + 1) * per_process),
        micro=micro, reading=reading, store=store, same_at_start=same_at_start, say=say,
        images_per_pass=config.train.images_per_pass,
    )  # fmt: skip

    # ---- Steps -------------------------------------------------------------------------------------------------------
    with TrainProgress(first, steps, say, show=main) as progress:
        for step in range(first, steps):
            started = time.monotonic()
            rate = learning_rate(config.optimizer, step, steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            indices = selection.groups(step)
            current = with_auto_beta(objective, config.train.auto_beta, state.extra)

            # ---- Forward and backward, micro-batch by micro-batch ----
            waited = gradient.waited
            totals = gradient(step, indices, current)

            # ---- Update ----
            norm = whole(accelerator.clip_grad_norm_(policy.values(), config.train.max_grad_norm))
            if accelerator.scaler is None:
                reading.norm(step, [source.group_ids[i] for i in indices], norm)
            skipped = is_freak(norm, config.train.skip_grad_norm, state.extra)
            if not skipped:
                optimizer.step()
            optimizer.zero_grad()
            if ema is not None:
                decay = config.train.ema_decay
                torch._foreach_lerp_(list(ema.values()), [p.detach() for p in policy.values()], 1 - decay)

            # ---- Log ----
            done = step + 1
            logs = done % config.train.log_every == 0 or done == steps
            if logs or reading.eager or config.train.auto_beta:
                reading.check()
                row = logged(accelerator, totals) | {"grad_norm": float(norm), "lr": rate}
                if config.train.skip_grad_norm:
                    row["skipped"] = float(skipped)
                if config.train.auto_beta:
                    row["beta"] = current.beta
                    remember_margin(row, current.beta, state.extra)
            pace.add(time.monotonic() - started, gradient.waited - waited)
            if logs:
                if metrics_log:
                    metrics_log.log(done, row, pace.row())
                oversight.row({"step": done, **row})
            progress.update(done, row)
            if store:
                store.tidy()

            # ---- Validate ----
            if validation and validations and validation.due(done, steps):
                reading.check()
                with averaged(policy, ema):
                    means = validate(validation, validations, oversight, accelerator, backbone, run_dir, done)
                    best, idle = best_of(validations.rows)
                    if main and best == done:
                        backbone.save_weights(run_dir / "best")
                if metrics_log:
                    metrics_log.track(done, means)
            stopping = oversight.stops or bool(patience and idle >= patience)

            # ---- Checkpoint ----
            if done % config.checkpoint.every == 0 or done == steps or stopping:
                reading.check()
                if store:
                    store.flush()
                if main or sharded:
                    state = replace(state, step=done, optimizer=_inner(optimizer))
                    save_checkpoint(run_dir, state, plain_config, config.checkpoint.keep, write=main)
                accelerator.wait_for_everyone()
            if stopping:
                steps = done
                break

    # ---- Weights for diffusers ---------------------------------------------------------------------------------------
    if metrics_log:
        metrics_log.close()
    if main or sharded:
        _save_weights(backbone, policy, ema, run_dir, main, sharded)
    accelerator.wait_for_everyone()
    if main and patience and idle >= patience and validations:
        say(
            f"no better validation in {idle} of them: stopped at step {steps}; best/ is step {best_of(validations.rows)[0]}"
        )
    if main and (slow := pace.verdict()):
        say(slow)
    oversight.close()
    if oversight.stops:
        raise DiffalignError(oversight.reason())
    return TrainResult(run_dir, steps, row)


def validate(
    validation: Validation,
    log: ValidationLog,
    oversight: Oversight,
    accelerator: Accelerator,
    backbone: Any,
    run_dir: Path,
    done: int,
) -> dict[str, float]:
    """The main process draws and scores; all learn the outcome, since it may end the run. Returns means for trackers."""
    message: list[Any] = [validation.run(backbone, run_dir, done) if accelerator.is_main_process else None]
    row = broadcast_object_list(message)[0]
    log.add(row)
    oversight.validation(row)
    column = next(iter(row["scores"]))
    if oversight.main:
        oversight.say(f"validation at step {done}: {column} {score_of(row):.4f}")
    return {f"validation/{column}": score_of(row)}


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    """The optimiser inside accelerate's wrapper."""
    return optimizer.optimizer if hasattr(optimizer, "optimizer") else optimizer


def _save_weights(
    backbone: Any, policy: dict[str, Any], ema: dict[str, Tensor] | None, run_dir: Path, main: bool, sharded: bool
) -> None:
    """The averaged weights if an average is kept, else the last ones."""
    with torch.no_grad():
        for name, average in (ema or {}).items():
            policy[name].copy_(average)
    if sharded:
        save_sharded(backbone, run_dir / "weights", write=main)
    else:
        backbone.save_weights(run_dir / "weights")
