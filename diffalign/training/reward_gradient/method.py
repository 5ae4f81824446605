"""The reward-gradient loop, from top to bottom, on the run directory and checkpoints of `loop.py`.

A step draws an image for each of `images_per_step` prompts, follows the gradient of their rewards back into the policy's
weights, and updates them:

    loss of the step = sum over its images of the loss / images_per_step

so neither accumulation nor the number of processes can change it. The same command run again goes on from the newest complete
checkpoint, bit for bit on the same machine.
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from diffalign.errors import DiffalignError
from diffalign.training.checkpoint import TrainState, checkpoints, load_checkpoint, save_checkpoint
from diffalign.training.gradient_sum import Parameters, Sums, check_finite, set_rate, update
from diffalign.training.health import Oversight
from diffalign.training.optim import build_optimizer, learning_rate
from diffalign.training.order import groups_for_step
from diffalign.training.pace import Pace
from diffalign.training.preference.method import Say, TrainResult, start_accelerator, validate
from diffalign.training.progress import TrainProgress
from diffalign.training.reward_gradient.draws import make_gradient_draws, span_of
from diffalign.training.reward_gradient.step import Scores, reward_gradient_step
from diffalign.training.run_dir import open_run_dir
from diffalign.training.tracking import Metrics
from diffalign.training.validation import Validation, ValidationLog, averaged, best_of

REMEDY = "lower optimizer.lr, the rewards' weights, or the number of steps with a gradient"


def prepare_policy(config: Any, backbone: Any) -> Parameters:
    """Make the policy trainable, equal to the reference at first; returns what trains."""
    tune = config.tune
    if tune.kind == "lora":
        backbone.add_lora(tune.rank, tune.alpha, targets=tune.targets, seed=config.seed, init=tune.init)
    else:
        backbone.enable_full(keep_reference=config.drift.measure or config.drift.weight > 0)
    backbone.trunk.train()
    parameters: Parameters = backbone.trainable()
    return parameters


def reward_gradient(
    config: Any,
    *,
    backbone: Any,
    source: Any,
    shape: tuple[int, int, int],
    scores: Scores,
    say: Say = print,
    accelerator: Accelerator | None = None,
    validation: Validation | None = None,
) -> TrainResult:
    """Train `backbone` on the gradient of `scores` as `config` (a RewardGradientConfig) says; all goes into `config.run_dir`.

    `source` offers `len(source)`, `batch(indices) -> conditioning`, `ids` and `unconditional`; `shape` is (C, h, w) of a
    latent; `scores` decodes and judges latents. Raises DiffalignError for a checkpoint of another config, for scores without
    a gradient, for losses that are not finite, for a full disk, and for an alarm where on_alarm is stop.
    """
    # ---- Set-up ------------------------------------------------------------------------------------------------------
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    accelerator = accelerator or start_accelerator(config)
    main, run_dir, steps = accelerator.is_main_process, Path(config.run_dir), config.train.steps
    images = config.train.images_per_step
    per_process, rest = divmod(images, accelerator.num_processes)
    micro = min(config.train.micro_batch, per_process)
    if rest or per_process % micro:
        raise DiffalignError(
            f"train.images_per_step={images} cannot be cut into micro-batches of {config.train.micro_batch} images over "
            f"{accelerator.num_processes} processes; make it a multiple of their product"
        )
    side = backbone.vae_scale_factor
    times = backbone.sampling_times(config.sampler.steps, shape[1] * side, shape[2] * side)
    policy = prepare_policy(config, backbone)
    optimizer = build_optimizer(config.optimizer, policy.values())
    ema = {k: p.detach().clone() for k, p in policy.items()} if config.train.ema_decay else None
    state = TrainState(0, policy, optimizer, ema)
    plain_config = config.model_dump(mode="json", exclude={"model": {"token"}})

    # ---- Resume ------------------------------------------------------------------------------------------------------
    saved = checkpoints(run_dir)
    first = load_checkpoint(saved[-1], state, plain_config) if saved else 0
    if first > steps:
        raise DiffalignError(
            f"{run_dir} has {first} steps already; train.steps={steps} would go back: choose another run_dir"
        )
    metrics_log = None
    if main:
        if first:
            say(f"going on from {saved[-1]}")
        open_run_dir(run_dir, plain_config)
        metrics_log = Metrics(run_dir, config.tracking.trackers, config.tracking.project, plain_config, first)
    oversight = Oversight(run_dir, config.on_alarm, (), first, say, main)
    validations = ValidationLog(run_dir, first, main) if validation else None
    if validation and validations and not validations.rows:
        validate(validation, validations, oversight, accelerator, backbone, run_dir, 0)
    patience = config.validation.patience
    idle = best_of(validations.rows)[1] if validations else 0
    if patience and idle >= patience:
        steps = first
    row: dict[str, float] = {}
    pace = Pace()

    # ---- Steps -------------------------------------------------------------------------------------------------------
    with TrainProgress(first, steps, say, show=main) as progress:
        for step in range(first, steps):
            started, waited = time.monotonic(), 0.0
            totals = Sums()
            rate = set_rate(optimizer, learning_rate(config.optimizer, step, config.train.steps))
            indices = groups_for_step(len(source), images, step, config.seed)
            mine = range(accelerator.process_index * per_process, (accelerator.process_index + 1) * per_process)
            span = span_of(config, step)

            # ---- Draw, judge and follow back, micro-batch by micro-batch ----
            for start in mine[::micro]:
                slots = list(range(start, start + micro))
                chosen = [indices[s] for s in slots]
                ids = [source.ids[i] for i in chosen]
                began = time.monotonic()
                conditioning = source.batch(chosen)
                draws = make_gradient_draws(config, step, slots, ids, shape)
                waited += time.monotonic() - began
                with accelerator.autocast():
                    output = reward_gradient_step(
                        config, backbone, times, conditioning, source.unconditional, draws, span, chosen, scores
                    )
                share = output.loss.sum() / images
                check_finite("loss", share, step, ids, run_dir, REMEDY)
                share.backward()
                totals.add({"loss": output.loss.detach(), **output.metrics})

            # ---- Update ----
            norm = update(accelerator, policy, optimizer, config, step, run_dir, REMEDY)
            if ema is not None:
                weights = [p.detach() for p in policy.values()]
                torch._foreach_lerp_(list(ema.values()), weights, 1 - config.train.ema_decay)

            # ---- Log ----
            done = step + 1
            where = {"judged_step": float(span.stop), "gradient_steps": float(span.length)}
            row = totals.means(accelerator) | {"grad_norm": norm, "lr": rate} | where
            pace.add(time.monotonic() - started, waited)
            if done % config.train.log_every == 0 or done == steps:
                if metrics_log:
                    metrics_log.log(done, row, pace.row())
                oversight.row({"step": done, **row})
            progress.update(done, row)

            # ---- Validate ----
            if validation and validations and validation.due(done, steps):
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
                if main:
                    save_checkpoint(run_dir, replace(state, step=done), plain_config, config.checkpoint.keep)
                accelerator.wait_for_everyone()
            if stopping:
                steps = done
                break

    # ---- Weights for diffusers ---------------------------------------------------------------------------------------
    if metrics_log:
        metrics_log.close()
    if main:
        with averaged(policy, ema):
            backbone.save_weights(run_dir / "weights")
    accelerator.wait_for_everyone()
    if main and patience and idle >= patience and validations:
        say(
            f"no better validation in {idle} of them: stopped at step {steps}; best/ is step {best_of(validations.rows)[0]}"
        )
    oversight.close()
    if oversight.stops:
        raise DiffalignError(oversight.reason())
    return TrainResult(run_dir, steps, row)
