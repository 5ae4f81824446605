"""The run, from top to bottom: what all trainers do around their steps.

A method (`preference/method.py`, `distillation/method.py`, `reward_gradient/method.py`, `judge/loop.py`) knows how to take
one step. The run resumes it, logs, validates, saves and stops. The same command again continues from the newest complete
checkpoint, bit for bit on the same machine.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator

from diffalign import stopping
from diffalign.config import RunConfig
from diffalign.health import Finding
from diffalign.training.alone import Alone
from diffalign.training.average import averaged, examine_average, keep_average, update_average
from diffalign.training.checkpoint import About, TrainState, drop_old_checkpoints, resume, save_checkpoint
from diffalign.training.finite import FiniteGuard
from diffalign.training.health import HealthMonitor, OnAlarm
from diffalign.training.progress import Pace, TrainProgress
from diffalign.training.protocols import Say
from diffalign.training.run_dir import open_run_dir
from diffalign.training.same_run import Resolved, plain_config
from diffalign.training.stop import StopSignal
from diffalign.training.tracking import Metrics
from diffalign.training.validation import Validation, Validations


class Method(Protocol):
    """A way of training: what `run` needs of it, ready to take its first step.

    state: what a checkpoint holds, restored in place; finite: where steps note numbers that must be finite; readme: the text
    of the run directory's README; on_alarm: what a health alarm does, None without health checks; waiting_remedy: what
    shortens waiting for data, None where steps do not measure it.
    """

    accelerator: Accelerator
    state: TrainState
    finite: FiniteGuard
    readme: str
    on_alarm: OnAlarm | None
    waiting_remedy: str | None

    def step(self, step: int) -> float:
        """Update the weights; return the seconds in which groups or prompts were read and drawn and nothing else was done.

        On a GPU it reads no number.
        """

    def row(self) -> dict[str, float]:
        """Read the last step's metrics, means over all processes. Every process calls it, and waits for its GPU."""

    def save_weights(self, folder: Path) -> None:
        """Write the weights for use elsewhere. Every process calls it, and one writes."""


@dataclass(frozen=True)
class TrainResult:
    """A finished run: run_dir/weights holds the weights after `step` steps; metrics are those of the last row."""

    run_dir: Path
    step: int
    metrics: dict[str, float]


def run(
    config: RunConfig,
    method: Method,
    *,
    say: Say = print,
    validation: Validation | None = None,
    findings: Sequence[Finding] = (),
    resolved: Resolved | None = None,
) -> TrainResult:
    """Train `method` for `config.train.steps` steps; everything is written into `config.run_dir`.

    findings: of the health checks about the data, before training. resolved: what keys of the config stand for, such as the
    fingerprint of a folder; a checkpoint of other content is refused. Raises DiffalignError for a checkpoint of another config,
    numbers that are not finite, a full disk, and an alarm where it stops the run; Stopped where a signal does, after a
    checkpoint.
    """
    # ---- Set-up: the number of threads changes the last bits of sums, so fixing it makes runs repeatable -------------
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    accelerator, state, finite = method.accelerator, method.state, method.finite
    main, run_dir, steps = accelerator.is_main_process, Path(config.run_dir), config.train.steps
    plain, stop = plain_config(config), StopSignal()

    # ---- Resume: before anything is written, so that a run of another config is refused and stays as it was ----------
    resumed = resume(config, state, resolved or {})
    first = resumed.step

    # ---- Run directory: rows after the checkpoint are cut, so that a resumed run's files are a straight one's --------
    log = None
    if main:
        for line in (f"resuming after step {first}" if first else None, resumed.changed):
            if line:
                say(line)
        drop_old_checkpoints(run_dir, config.checkpoint.keep)
        open_run_dir(run_dir, plain, method.readme)
        rows, track = resumed.rows, config.tracking
        log = Metrics(run_dir, track.trackers, track.project, plain, first, rows, resumed.interim)
    alone = Alone(accelerator, run_dir)
    alarm = method.on_alarm
    found = [*findings, *examine_average(state.decay, steps)]
    health = HealthMonitor(run_dir, alarm, found, first, say, main) if alarm else None
    validations = Validations(validation, run_dir, first, accelerator, alone, health, say) if validation else None
    if first:
        stopping.keep(f"step {first} of {steps} is")

    def validate(done: int) -> None:
        """Validate the average, if one is kept, in the weights' place, and keep the best."""
        if validations is None:
            return
        finite.check()
        with averaged(state.policy, state.average):
            means = validations.run(done)
            if done and validations.best == done:
                with alone.main_alone():
                    method.save_weights(run_dir / "best")
        if log and done:
            log.track(done, means)

    # ---- Validation before the first step: what all later ones are compared with; or one that a stop left out --------
    if validations and (not validations.rows or validations.lacks(first, steps)):
        validate(first)
    if validations and validations.exhausted:
        steps = first

    # ---- Steps -------------------------------------------------------------------------------------------------------
    row: dict[str, float] = {}
    asked = False
    pace = Pace(method.waiting_remedy)
    with TrainProgress(first, steps, say, show=main) as progress, stopping.deferred():
        for step in range(first, steps):
            # ---- Step: everything that changes weights ----
            started = time.monotonic()
            waited = method.step(step)
            update_average(state, step)
            done = step + 1
            asked = stop.asked() and done < steps

            # ---- Log: on a GPU the only place where the host waits, so rows that are not logged are not read ----
            logs = done % config.train.log_every == 0 or done == steps
            if logs or finite.eager:
                finite.check()
                row = method.row()
            pace.add(time.monotonic() - started, waited)
            if logs and log:
                log.log(done, row, pace.row())
            if logs and health:
                health.row({"step": done, **row})
            progress.update(done, row)

            # ---- Validate; after a signal the resumed run does, since there may be seconds left ----
            if validations and validations.due(done, steps) and not asked:
                validate(done)
            stopping_here = bool((health and health.stops) or (validations and validations.exhausted))

            # ---- Checkpoint: also where a run stops early, so that nothing that was trained is lost ----
            if done % config.checkpoint.every == 0 or done == steps or stopping_here or asked:
                finite.check()
                interim = asked and done % config.checkpoint.every != 0
                about = About(plain, resolved or {}, log.recent() if log else (), interim)
                with alone.main_alone():
                    save_checkpoint(run_dir, done, state, about, config.checkpoint.keep, write=main)
                stopping.keep(f"step {done} of {steps} is")
            if stopping_here or asked:
                steps = done
                break

    # ---- Weights: the average, if one is kept, else the last ones; none of a run that a signal stopped ---------------
    if log:
        log.close()
    if asked:
        if health:
            health.close(config.train.steps)
        alone.close()
        raise stopping.Stopped
    keep_average(state)
    with alone.main_alone():
        method.save_weights(run_dir / "weights")
    alone.close()

    # ---- Last words: why it stopped, what slowed it down, what was found ---------------------------------------------
    if main and validations and validations.exhausted:
        say(validations.why_stopped(steps))
    if main and (warning := pace.waiting_warning()):
        say(warning)
    if health:
        health.close(config.train.steps)
    return TrainResult(run_dir, steps, row)
