"""Preference training as a method: an objective over groups of ranked images (`diffalign train`).

One optimiser step: `groups_per_step` groups are drawn by a seeded order, cut over processes and micro-batches, and

    loss of the step = sum over its groups of weight * loss / groups_per_step

so neither accumulation nor the number of processes can change it.
"""

from pathlib import Path

from accelerate import Accelerator
from torch import Tensor

from diffalign.config import TrainConfig
from diffalign.pipelines import Backbone
from diffalign.training.average import move_average, start_average
from diffalign.training.average_decay import decay_of, reference_decay
from diffalign.training.checkpoint import TrainState
from diffalign.training.device import bf16_throughout, share_of_step
from diffalign.training.finite import FiniteGuard
from diffalign.training.health import OnAlarm
from diffalign.training.optim import build_optimizer, learning_rate, set_rate
from diffalign.training.order import check_units
from diffalign.training.preference.gradient import HasBeta, StepGradient, logged
from diffalign.training.preference.kernel_check import check_cudnn
from diffalign.training.preference.online import Online
from diffalign.training.preference.policy import build_objective, prepare_policy
from diffalign.training.preference.reference_key import open_store
from diffalign.training.preference.selection import Selection
from diffalign.training.preference.stabilise import is_outlier, remember_margin, with_auto_beta, with_beta_end
from diffalign.training.protocols import GroupSource, Say
from diffalign.training.readme import train_readme
from diffalign.training.sharding import save_sharded, whole

REMEDY = "look at these images and captions, or lower optimizer.lr or objective.beta"
WAITING_REMEDY = "data.cache=all and a fast disk for data.cache_dir shorten it"


class Preference:
    """A policy that learns an objective on groups of ranked images."""

    on_alarm: OnAlarm | None
    waiting_remedy: str | None = WAITING_REMEDY

    def __init__(
        self,
        config: TrainConfig,
        backbone: Backbone,
        source: GroupSource,
        accelerator: Accelerator,
        say: Say,
        online: Online | None = None,
    ) -> None:
        """Make `backbone` trainable and cut the step's groups over the processes.

        online: draws the groups of `source` during the run; None: they are there. Raises DiffalignError where they cannot be
        cut, where `selection` asks for more images than there are, and for a reference.store of other draws.
        """
        self.config, self.backbone, self.source, self.accelerator = config, backbone, source, accelerator
        self.online = online
        train = config.train
        self.readme, self.on_alarm = train_readme(config), config.on_alarm
        self.objective = build_objective(config.objective)
        self.finite = FiniteGuard(accelerator.device, config.run_dir, "groups", REMEDY)
        self.selection = Selection.of(config, source)
        share = share_of_step(train.groups_per_step, train.micro_batch, accelerator, "groups")
        check_units(source.buckets, train.micro_batch, share.micro)
        self.store = open_store(config, source, backbone, self.objective, accelerator, share.micro, say)

        # ---- What trains: before accelerate wraps anything ----
        same_at_start = prepare_policy(config, backbone, self.objective)
        if bf16_throughout(config, cuda=accelerator.device.type == "cuda"):
            backbone.compute_low()
        self.policy = backbone.trainable()
        optimizer = build_optimizer(config.optimizer, self.policy.values())
        self.sharded = train.shard == "fsdp2"
        decay, self.reference_decay = decay_of(train), reference_decay(config.tune)
        self.state = TrainState(
            self.policy, optimizer, start_average(self.policy, decay), decay,
            scaler=accelerator.scaler, sharded=self.sharded, store=self.store,
            reference=backbone.followers() if config.tune.reference_moves else None,
            drawn=online.groups if online else None,
        )  # fmt: skip

        # ---- Several processes: DDP averages gradients; weights that are cut over processes do so themselves ----
        module, self.optimizer = backbone.trunk, optimizer
        if not self.sharded:
            module, self.optimizer = accelerator.prepare(backbone.trunk, optimizer)
        # Checked once, by the first step of this process.
        self.cudnn = backbone.cudnn if config.model.attention == "cudnn" else None
        self.say = say
        self.gradient = StepGradient(
            config, backbone, source, self.selection, accelerator, module, self.policy, share,
            self.finite, self.store, same_at_start, say, train.images_per_pass,
        )  # fmt: skip

    def step(self, step: int) -> float:
        """Take one optimiser step on the groups of `step`; return the seconds of waiting for them."""
        config, accelerator, extra = self.config, self.accelerator, self.state.extra
        if self.online is not None:
            self.online.begin(step, self.state)
        rate = set_rate(self.optimizer, learning_rate(config.optimizer, step, config.train.steps))
        indices = self.selection.groups(step)
        objective = with_auto_beta(self.objective, config.train.auto_beta, extra)
        objective = with_beta_end(objective, step, config.train.steps)

        # ---- Gradient: reference and policy on every micro-batch, and the loss backward ----
        if self.cudnn is not None:
            check_cudnn(self.cudnn, lambda: self.gradient(step, indices, objective), self.policy, self.say)
            self.cudnn = None
        waited = self.gradient.waited
        self.totals = self.gradient(step, indices, objective)

        # ---- Update: gradients are cut to size, and an outlier is skipped if that was asked for ----
        norm: Tensor = whole(accelerator.clip_grad_norm_(self.policy.values(), config.train.max_grad_norm))
        if accelerator.scaler is None:  # fp16's scaler skips a step that overflows, and takes it into account
            self.finite.norm(step, [self.source.group_ids[i] for i in indices], norm)
        skipped = is_outlier(norm, config.train.skip_grad_norm, extra)
        if not skipped:
            self.optimizer.step()
        elif accelerator.scaler is not None:
            accelerator.scaler.update()  # it expects one after every unscaled gradient, and lowers its scale on overflow
        self.optimizer.zero_grad()
        if self.reference_decay and self.state.reference is not None:
            move_average(self.state.reference, self.policy, self.reference_decay.at(step))

        # ---- Numbers: kept on the device until a row is due; beta of the next step depends on this one's ----
        self.plain: dict[str, float | Tensor] = {"grad_norm": norm, "lr": rate}
        if config.train.skip_grad_norm:
            self.plain["skipped"] = float(skipped)
        if isinstance(objective, HasBeta) and (config.train.auto_beta or objective is not self.objective):
            self.plain["beta"] = objective.beta
        if config.train.auto_beta and isinstance(objective, HasBeta):
            self.finite.check()
            remember_margin(self.row(), objective.beta, extra)
        if self.store:
            self.store.tidy()
        return self.gradient.waited - waited

    def row(self) -> dict[str, float]:
        """Read the last step's metrics: means over the groups that count."""
        drawn = self.online.row() if self.online is not None else {}
        return logged(self.accelerator, self.totals) | {k: float(v) for k, v in self.plain.items()} | drawn

    def save_weights(self, folder: Path) -> None:
        """Write the policy in diffusers' format."""
        if self.sharded:
            save_sharded(self.backbone, folder, write=self.accelerator.is_main_process)
        elif self.accelerator.is_main_process:
            self.backbone.save_weights(folder)
