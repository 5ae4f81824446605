"""The distillation loop, from top to bottom: DMD2's order, on the run directory and checkpoints of `loop.py`.

A step is one update of the student and `fake.updates` of the fake network. Its first iteration rolls the student out, moves
the student, and then trains the fake network on the same images; the others roll out anew and train the fake network
alone. DMD2 counts iterations: its 19,000 at a ratio of 5 are 3,800 steps here.

    loss of an update = sum over its images of the loss / images of the update

Processes sum their gradients themselves, since two networks learn in turn: nothing is wrapped. A checkpoint holds student,
fake network and both optimisers, so that a run goes on bit for bit.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffalign.errors import DiffalignError
from diffalign.pipelines.features import feature_width
from diffalign.pipelines.few_step import FewStep
from diffalign.training.checkpoint import Partner, TrainState, checkpoints, load_checkpoint, save_checkpoint
from diffalign.training.distillation.critic import Critic, CriticDraws, adversarial_step, critic_step, make_critic_draws
from diffalign.training.distillation.draws import DistillDraws, group_shape, make_distill_draws
from diffalign.training.distillation.policy_gradient import Transition, policy_step
from diffalign.training.distillation.step import Against, Judge, Lean, fake_step, roll_out, student_step
from diffalign.training.gradient_sum import Parameters, Sums, check_finite, set_rate, update
from diffalign.training.health import Oversight
from diffalign.training.optim import build_optimizer, learning_rate
from diffalign.training.order import groups_for_step
from diffalign.training.pace import Pace
from diffalign.training.preference.method import Say, TrainResult, start_accelerator, validate
from diffalign.training.progress import TrainProgress
from diffalign.training.run_dir import open_run_dir
from diffalign.training.tracking import Metrics
from diffalign.training.validation import Validation, ValidationLog, averaged, best_of

REMEDY = "lower optimizer.lr or fake.optimizer.lr, or match.guidance"


def prepare_networks(config: Any, backbone: Any) -> tuple[Parameters, Parameters]:
    """Student and fake network, both equal to the teacher at first; returns what each of them trains."""
    tune = config.tune
    if tune.kind == "lora":
        backbone.add_lora(tune.rank, tune.alpha, targets=tune.targets, seed=config.seed, init=tune.init)
    else:
        backbone.enable_full()
    backbone.add_fake(seed=config.seed + 1)
    backbone.trunk.train()
    return backbone.trainable("student"), backbone.trainable("fake")


def distill(
    config: Any,
    *,
    backbone: Any,
    student: FewStep,
    source: Any,
    shape: tuple[int, int, int],
    judge: Judge | None = None,
    lean: Lean | None = None,
    real: Any = None,
    say: Say = print,
    accelerator: Accelerator | None = None,
    validation: Validation | None = None,
) -> TrainResult:
    """Distil `backbone` into the few-step `student` as `config` (a DistillConfig) says; all goes into `config.run_dir`.

    `source` offers `len(source)`, `batch(indices) -> conditioning`, `ids` and `unconditional`; `shape` is (C, h, w) of a
    latent; `judge` scores finished latents, `lean` with a gradient; `real` (`RealImages`) is what
    the critic compares with where `config.gan` has a weight. Raises DiffalignError for a checkpoint of another
    config, for losses that are not finite, for a full disk, and for an alarm where on_alarm is stop.
    """
    # ---- Set-up ------------------------------------------------------------------------------------------------------
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    accelerator = accelerator or start_accelerator(config)
    main, run_dir, steps = accelerator.is_main_process, Path(config.run_dir), config.train.steps
    groups, iterations = config.train.groups_per_step, config.fake.updates
    per_process, rest = divmod(groups, accelerator.num_processes)
    micro = min(config.train.micro_batch, per_process)
    if rest or per_process % micro:
        raise DiffalignError(
            f"train.groups_per_step={groups} cannot be cut into micro-batches of {config.train.micro_batch} groups over "
            f"{accelerator.num_processes} processes; make it a multiple of their product"
        )
    images, _ = group_shape(config.group)
    learnt, fake = prepare_networks(config, backbone)
    critic = _critic(config, backbone, real, fake) if config.gan.weight else None
    optimizer = build_optimizer(config.optimizer, learnt.values())
    fake_optimizer = build_optimizer(config.fake.optimizer, fake.values())
    ema = {k: p.detach().clone() for k, p in learnt.items()} if config.train.ema_decay else None
    state = TrainState(0, learnt, optimizer, ema, partners={"fake": Partner(fake, fake_optimizer)})
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
        _validate(validation, validations, oversight, accelerator, backbone, run_dir, 0)
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
            norms: dict[str, float] = {}
            rates = {
                "lr": set_rate(optimizer, learning_rate(config.optimizer, step, config.train.steps)),
                "fake_lr": set_rate(fake_optimizer, learning_rate(config.fake.optimizer, step, config.train.steps)),
            }
            rewarded = step >= config.reward.start_step

            for inner in range(iterations):
                iteration = step * iterations + inner
                indices = groups_for_step(len(source), groups, iteration, config.seed)
                mine = range(accelerator.process_index * per_process, (accelerator.process_index + 1) * per_process)
                seen: list[tuple[Tensor, dict[str, Tensor], DistillDraws, CriticDraws | None]] = []
                kept: list[tuple[dict[str, Tensor], Transition]] = []

                # ---- Roll out, and in the first iteration move the student ----
                for start in mine[::micro]:
                    slots = list(range(start, start + micro))
                    chosen = [indices[s] for s in slots]
                    began = time.monotonic()
                    batch = source.batch(chosen)
                    conditioning = {k: v.repeat_interleave(images, dim=0) for k, v in batch.items()}
                    ids = [source.ids[i] for i in chosen]
                    draws = make_distill_draws(config, student, iteration, slots, ids, shape)
                    beside = None
                    if critic is not None:
                        beside = make_critic_draws(config, student.process, iteration, slots, ids, shape, images)
                    waited += time.monotonic() - began
                    if inner > 0:
                        with accelerator.autocast(), torch.no_grad():
                            rolled = roll_out(backbone, student, conditioning, draws, learn=False, finish=False)
                        seen.append((rolled.x, conditioning, draws, beside))
                        continue
                    with accelerator.autocast():
                        output = student_step(
                            config, backbone, student, conditioning, source.unconditional, draws,
                            [i for i in chosen for _ in range(images)], judge, lean, rewarded,
                            _against(backbone, critic, conditioning, beside),
                        )  # fmt: skip
                    share = output.loss.sum() / (groups * images)
                    check_finite("student's loss", share, step, ids, run_dir, REMEDY)
                    share.backward()
                    squared = {"r_dm_squared": output.metrics["r_dm"].square()}
                    totals.add({"student_loss": output.loss.detach(), **output.metrics, **squared})
                    seen.append((output.x, conditioning, draws, beside))
                    if output.kept is not None:
                        kept.append((conditioning, output.kept))
                if inner == 0:
                    norms["grad_norm"] = update(accelerator, learnt, optimizer, config, step, run_dir, REMEDY)
                    if ema is not None:
                        weights = [p.detach() for p in learnt.values()]
                        torch._foreach_lerp_(list(ema.values()), weights, 1 - config.train.ema_decay)

                # ---- Roll-outs used again, by importance ratios ----
                for _ in range(config.reward.policy_reuse if kept else 0):
                    for conditioning, transition in kept:
                        with accelerator.autocast():
                            loss, ratios = policy_step(config, backbone, student, conditioning, transition)
                        share = loss.sum() / (groups * images)
                        check_finite("policy's loss", share, step, [], run_dir, REMEDY)
                        share.backward()
                        totals.add(ratios, share=1 / config.reward.policy_reuse)
                    update(accelerator, learnt, optimizer, config, step, run_dir, REMEDY)

                # ---- Train the fake network on these images ----
                for x, conditioning, draws, beside in seen:
                    with backbone.role("fake"):
                        with accelerator.autocast():
                            loss, told = _fake_loss(config, backbone, x, conditioning, draws, critic, real, beside)
                        share = loss.sum() / (groups * images)
                        check_finite("fake network's loss", share, step, [], run_dir, REMEDY)
                        share.backward()
                    totals.add(told, share=1 / iterations)
                norms["fake_grad_norm"] = update(accelerator, fake, fake_optimizer, config, step, run_dir, REMEDY)

            # ---- Log ----
            done = step + 1
            row = _with_error(totals.means(accelerator), groups) | norms | rates
            pace.add(time.monotonic() - started, waited)
            if done % config.train.log_every == 0 or done == steps:
                if metrics_log:
                    metrics_log.log(done, row, pace.row())
                oversight.row({"step": done, **row})
            progress.update(done, row)

            # ---- Validate ----
            if validation and validations and validation.due(done, steps):
                with averaged(learnt, ema):
                    means = _validate(validation, validations, oversight, accelerator, backbone, run_dir, done)
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
        with averaged(learnt, ema):
            backbone.save_weights(run_dir / "weights")
    accelerator.wait_for_everyone()
    oversight.close()
    if oversight.stops:
        raise DiffalignError(oversight.reason())
    return TrainResult(run_dir, steps, row)


def _critic(config: Any, backbone: Any, real: Any, fake: Parameters) -> Critic:
    """The discriminator's head; its parameters join those of the fake network, with which they train and are saved."""
    latents, conditioning = real.batch([0])
    width = feature_width(backbone, latents.to(backbone.device), conditioning)
    critic = Critic(width, config.gan.hidden, config.seed + 2).to(backbone.device)
    fake.update({f"critic.{name}": parameter for name, parameter in critic.named_parameters()})
    return critic


def _against(
    backbone: Any, critic: nn.Module | None, seen: dict[str, Tensor], draws: CriticDraws | None
) -> Against | None:
    """What pulls the student's images towards real ones; None without a critic."""
    if critic is None or draws is None:
        return None
    return partial(adversarial_step, backbone, critic, seen, draws)


def _fake_loss(
    config: Any,
    backbone: Any,
    x: Tensor,
    seen: dict[str, Tensor],
    draws: DistillDraws,
    critic: nn.Module | None,
    real: Any,
    beside: CriticDraws | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss [N] of the fake network, with the head's where there is one, and metrics of [N]."""
    if critic is None or beside is None:
        error = fake_step(backbone, x, seen, draws)
        return error, {"fake_loss": error.detach()}
    images = real.batch(beside.real)
    error, judged, told = critic_step(backbone, critic, x, seen, draws.fake_noise, draws.fake_times, images, beside)
    loss = error + config.gan.critic_weight * judged
    return loss, {"fake_loss": error.detach(), "critic_loss": judged.detach(), **told}


def _with_error(row: dict[str, float], groups: int) -> dict[str, float]:
    """R_dm's standard error over the prompts in the place of its mean square; none for a single prompt."""
    variance = max(row.pop("r_dm_squared") - row["r_dm"] ** 2, 0.0)
    return row | {"r_dm_error": math.sqrt(variance / (groups - 1))} if groups > 1 else row


@contextmanager
def _own_draws(seed: int) -> Iterator[None]:
    """Some pipelines give their scheduler no generator, and re-noising then draws from the global one."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _validate(
    validation: Validation,
    log: ValidationLog,
    oversight: Oversight,
    accelerator: Accelerator,
    backbone: Any,
    run_dir: Path,
    done: int,
) -> dict[str, float]:
    """`validate` with the student's scheduler."""
    with _own_draws(validation.seed):
        return validate(validation, log, oversight, accelerator, backbone, run_dir, done)
