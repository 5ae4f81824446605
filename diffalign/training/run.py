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

from diffalign.config import RunConfig
from diffalign.health import Finding
from diffalign.training.alone import Alone
from diffalign.training.average import averaged, keep_average, update_average
from diffalign.training.checkpoint import TrainState, resume, save_checkpoint
from diffalign.training.finite import FiniteGuard
from diffalign.training.health import HealthMonitor, OnAlarm
from diffalign.training.progress import Pace, TrainProgress
from diffalign.training.protocols import PlainConfig, Say
from diffalign.training.run_dir import open_run_dir
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
) -> TrainResult:
    """Train `method` for `config.train.steps` steps; everything is written into `config.run_dir`.

    findings: of the health checks about the data, before training. Raises DiffalignError for a checkpoint of another config,
    numbers that are not finite, a full disk, and an alarm where it stops the run.
    """
    # ---- Set-up: the number of threads changes the last bits of sums, so fixing it makes runs repeatable -------------
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    accelerator, state, finite = method.accelerator, method.state, method.finite
    main, run_dir, steps = accelerator.is_main_process, Path(config.run_dir), config.train.steps
    plain_config: PlainConfig = config.model_dump(mode="json", exclude={"model": {"token"}})

    # ---- Resume: before anything is written, so that a run of another config is refused and stays as it was ----------
    first = resume(run_dir, state, plain_config, steps)

    # ---- Run directory: rows after the checkpoint are cut, so that a resumed run's files are a straight one's --------
    log = None
    if main:
        if first:
            say(f"resuming after step {first}")
        open_run_dir(run_dir, plain_config, method.readme)
        log = Metrics(run_dir, config.tracking.trackers, config.tracking.project, plain_config, first)
    alone = Alone(accelerator, run_dir)
    alarm = method.on_alarm
    health = HealthMonitor(run_dir, alarm, findings, first, say, main) if alarm else None
    validations = Validations(validation, run_dir, first, accelerator, alone, health, say) if validation else None

    # ---- Validation before the first step: what all later ones are compared with -------------------------------------
    if validations and not validations.rows:
        validations.run(0)
    if validations and validations.exhausted:
        steps = first

    # ---- Steps -------------------------------------------------------------------------------------------------------
    row: dict[str, float] = {}
    pace = Pace(method.waiting_remedy)
    with TrainProgress(first, steps, say, show=main) as progress:
        for step in range(first, steps):
            # ---- Step: everything that changes weights ----
            started = time.monotonic()
            waited = method.step(step)
            update_average(state)
            done = step + 1

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

            # ---- Validate: the average, if one is kept, in the weights' place ----
            if validations and validations.due(done, steps):
                finite.check()
                with averaged(state.policy, state.average):
                    means = validations.run(done)
                    if validations.best == done:
                        with alone.main_alone():
                            method.save_weights(run_dir / "best")
                if log:
                    log.track(done, means)
            stopping = bool((health and health.stops) or (validations and validations.exhausted))

            # ---- Checkpoint: also where a run stops early, so that nothing that was trained is lost ----
            if done % config.checkpoint.every == 0 or done == steps or stopping:
                finite.check()
                with alone.main_alone():
                    save_checkpoint(run_dir, done, state, plain_config, config.checkpoint.keep, write=main)
            if stopping:
                steps = done
                break

    # ---- Weights: the average, if one is kept, else the last ones ----------------------------------------------------
    if log:
        log.close()
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
        health.close()
    return TrainResult(run_dir, steps, row)
