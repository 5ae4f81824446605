"""Training a judge, from top to bottom.

A step takes `records_per_step` records of a seeded order, lets the method prepare them (sample traces, ask a teacher), and
makes one or several updates on the mean of their losses. The same command run again goes on from the newest checkpoint, bit
for bit on the same machine: every draw is keyed by the step, and the policy of the outer iteration is in the checkpoint.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from diffalign.errors import DiffalignError
from diffalign.judge.methods import METHODS
from diffalign.judge.tune import make_trainable, merged
from diffalign.rewards.judge import Judge
from diffalign.training.checkpoint import TrainState, checkpoints, load_checkpoint, save_checkpoint
from diffalign.training.optim import build_optimizer, learning_rate
from diffalign.training.order import groups_for_step
from diffalign.training.progress import TrainProgress, peak_memory
from diffalign.training.tracking import Metrics

README = """# {name}

`{base}` trained as a {role} of image scores with diffalign: method `{method}`, {steps} steps of {records} records, {kind}.

- `config.yaml`: the resolved config; `diffalign judge {folder}/config.yaml` goes on where this run stopped.
- `metrics.jsonl`: one row a step. `timing.jsonl`: seconds and peak memory.
- `weights/`: model, processor and read-out, adapters merged; measure it with `diffalign judge-eval {folder}/weights RATINGS`.
- `checkpoints/`: the state to go on from.
"""


def train_judge(
    config: Any,
    *,
    judge: Judge,
    records: Sequence[Any],
    teacher: Judge | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Train `judge` as `config` (a JudgeConfig) says, on pairs or on a teacher's distributions; returns run_dir/weights.

    Raises DiffalignError for a checkpoint of another config, a loss that is not finite, a full disk, several processes.
    """
    # ---- Set-up ------------------------------------------------------------------------------------------------------
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise DiffalignError("diffalign judge trains in one process; start it without a launcher")
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    run_dir, steps, per_step = Path(config.run_dir), config.train.steps, config.train.records_per_step
    policy = make_trainable(judge, config.tune, config.seed)
    if config.model.gradient_checkpointing:
        judge.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = build_optimizer(config.optimizer, policy.values())
    method = METHODS[config.method](judge, config, policy, teacher)
    # The policy of the outer iteration has the place that other runs have for their average.
    compared = config.method in ("gdso", "grpo") and config.loss.kl > 0
    reference = {name: p.detach().clone() for name, p in policy.items()} if compared else None
    state = TrainState(0, policy, optimizer, reference)
    plain = config.model_dump(mode="json")

    # ---- Resume ------------------------------------------------------------------------------------------------------
    saved = checkpoints(run_dir)
    start = load_checkpoint(saved[-1], state, plain) if saved else 0
    if start > steps:
        raise DiffalignError(
            f"{run_dir} has {start} steps already; train.steps={steps} would go back: choose another run_dir"
        )
    if start:
        say(f"going on from {saved[-1]}")
    _open(run_dir, config, plain)
    log = Metrics(run_dir, config.tracking.trackers, config.tracking.project, plain, start)
    bf16 = config.train.mixed_precision == "bf16" or (
        config.train.mixed_precision == "auto" and judge.device.type == "cuda"
    )

    # ---- Steps -------------------------------------------------------------------------------------------------------
    with TrainProgress(start, steps, say) as progress:
        for step in range(start, steps):
            started = time.monotonic()
            rate = learning_rate(config.optimizer, step, steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            if reference is not None and step % config.loss.outer_steps == 0:
                for name, value in reference.items():
                    value.copy_(policy[name].detach())
            indices = groups_for_step(len(records), per_step, step, config.seed)
            with torch.autocast(judge.device.type, torch.bfloat16, enabled=bf16):
                work = method.prepare(step, indices, [records[i] for i in indices], reference)
            rows = []
            # Checkpointing works in train mode alone, and would keep sampling from its cache.
            judge.model.train(config.model.gradient_checkpointing)
            for inner in range(config.loss.inner_updates):
                totals: dict[str, float] = {}
                for at in range(0, per_step, config.train.micro_batch):
                    part = work[at : at + config.train.micro_batch]
                    with torch.autocast(judge.device.type, torch.bfloat16, enabled=bf16):
                        loss, metrics = method.loss(part, inner == 0)
                    if not torch.isfinite(loss).all():
                        raise _not_finite("loss", step, run_dir)
                    (loss.sum() / per_step).backward()
                    for name, value in {"loss": loss.detach(), **metrics}.items():
                        totals[name] = totals.get(name, 0.0) + float(value.sum()) / per_step
                norm = torch.nn.utils.clip_grad_norm_(policy.values(), config.train.max_grad_norm)
                if not torch.isfinite(norm):
                    raise _not_finite("gradient norm", step, run_dir)
                optimizer.step()
                optimizer.zero_grad()
                rows.append(totals | {"grad_norm": float(norm)})
            judge.model.eval()

            # ---- Log and checkpoint ----
            done = step + 1
            row = {name: sum(r[name] for r in rows) / len(rows) for name in rows[0]} | {"lr": rate}
            if done % config.train.log_every == 0 or done == steps:
                log.log(done, row, {"seconds": time.monotonic() - started, "peak_gib": peak_memory()})
            progress.update(done, row)
            if done % config.checkpoint.every == 0 or done == steps:
                save_checkpoint(run_dir, replace(state, step=done), plain, config.checkpoint.keep)

    # ---- Weights -----------------------------------------------------------------------------------------------------
    log.close()
    merged(judge).save(run_dir / "weights")
    return run_dir / "weights"


def _open(run_dir: Path, config: Any, plain: dict[str, Any]) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiffalignError(f"run_dir {run_dir} cannot be made ({error.strerror}); choose another one") from error
    (run_dir / "config.yaml").write_text(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))
    text = README.format(
        name=run_dir.name,
        base=config.model.path,
        role=config.role,
        method=config.method,
        steps=config.train.steps,
        records=config.train.records_per_step,
        kind="LoRA" if config.tune.kind == "lora" else "all weights",
        folder=run_dir.as_posix(),
    )
    (run_dir / "README.md").write_text(text)


def _not_finite(what: str, step: int, run_dir: Path) -> DiffalignError:
    saved = checkpoints(run_dir)
    return DiffalignError(
        f"the {what} is not finite at step {step + 1}; the last good checkpoint is {saved[-1] if saved else 'none'}: "
        "lower optimizer.lr"
    )
