"""Training a judge, as a method of the run that all trainers share (`training/run.py`).

A step takes `records_per_step` records of a seeded order, lets the judge's method prepare them (sample traces, ask a
teacher), and makes one or several updates on the mean of their losses. Every draw is keyed by the step, and the policy of the
outer iteration is in the checkpoint, so a resumed run is the same run.
"""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from diffalign.config import JudgeConfig
from diffalign.errors import DiffalignError
from diffalign.judge.methods import METHODS
from diffalign.judge.records import RatedPair, Taught
from diffalign.judge.tune import make_trainable, merged
from diffalign.rewards.judge import Judge
from diffalign.training.checkpoint import TrainState
from diffalign.training.finite import FiniteGuard
from diffalign.training.gradient_sum import Network
from diffalign.training.health import OnAlarm
from diffalign.training.order import groups_for_step
from diffalign.training.readme import judge_readme

REMEDY = "lower optimizer.lr"


class JudgeTraining:
    """A judge that learns from pairs, or from a teacher's distributions, in one process."""

    on_alarm: OnAlarm | None = None  # health checks know the curves of diffusion models
    waiting_remedy: str | None = None  # images are read within the passes, so waiting for them is not measured

    def __init__(
        self, config: JudgeConfig, judge: Judge, records: Sequence[RatedPair | Taught], teacher: Judge | None
    ) -> None:
        """Raise DiffalignError in several processes, and where nothing has a name in tune.targets."""
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise DiffalignError("diffalign judge trains in one process; start it without a launcher")
        self.config, self.judge, self.records = config, judge, records
        self.accelerator = Accelerator(cpu=judge.device.type == "cpu")
        self.readme = judge_readme(config)
        self.finite = FiniteGuard(judge.device, config.run_dir, "records", REMEDY)
        policy = make_trainable(judge, config.tune, config.seed)
        if config.model.gradient_checkpointing:
            judge.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        train, precision = config.train, config.train.mixed_precision
        self.policy = Network(policy, config.optimizer, train.steps, train.max_grad_norm, self.accelerator, self.finite)
        self.method = METHODS[config.method](judge, config, policy, teacher)
        compared = config.method in ("gdso", "grpo") and config.loss.kl > 0
        reference = {name: p.detach().clone() for name, p in policy.items()} if compared else None
        self.state = TrainState(policy, self.policy.optimizer, ema=reference)
        self.bf16 = precision == "bf16" or (precision == "auto" and judge.device.type == "cuda")
        self.updates: list[tuple[dict[str, list[Tensor]], Tensor]] = []
        self.rate = 0.0

    def _autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.judge.device.type, torch.bfloat16, enabled=self.bf16)

    def step(self, step: int) -> float:
        """Prepare the records of `step`, and update the judge on them `loss.inner_updates` times."""
        config, per_step = self.config, self.config.train.records_per_step
        self.rate = self.policy.set_rate(step)

        # ---- Outer iteration: what the policy is compared with becomes the policy as it is ----
        reference = self.state.ema
        if reference is not None and step % config.loss.outer_steps == 0:
            for name, value in reference.items():
                value.copy_(self.state.policy[name].detach())

        # ---- Traces and a teacher's answers: before the first update, by the policy that is to be updated ----
        indices = groups_for_step(len(self.records), per_step, step, config.seed)
        with self._autocast():
            prepared = self.method.prepare(step, indices, [self.records[i] for i in indices], reference)

        # ---- Updates on the same prepared records ----
        # Checkpointing works in train mode alone, and would keep sampling from its cache.
        self.judge.model.train(config.model.gradient_checkpointing)
        self.updates = []
        for inner in range(config.loss.inner_updates):
            sums: dict[str, list[Tensor]] = {}
            for at in range(0, per_step, config.train.micro_batch):
                part = slice(at, at + config.train.micro_batch)
                with self._autocast():
                    loss, metrics = self.method.loss(prepared[part], inner == 0)
                self.policy.backward(step, [str(i) for i in indices[part]], loss, per_step)
                for name, value in {"loss": loss.detach(), **metrics}.items():
                    sums.setdefault(name, []).append(value.sum())
            self.updates.append((sums, self.policy.update(step)))
        self.judge.model.eval()
        return 0.0

    def row(self) -> dict[str, float]:
        """Read the last step's metrics: means over its records, and over its updates."""
        per_step = self.config.train.records_per_step
        rows = [
            {name: sum(float(part) / per_step for part in parts) for name, parts in sums.items()}
            | {"grad_norm": float(norm)}
            for sums, norm in self.updates
        ]
        return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]} | {"lr": self.rate}

    def save_weights(self, folder: Path) -> None:
        """Write model, processor and read-out. Adapters are merged into the weights, and gone afterwards."""
        merged(self.judge).save(folder)
