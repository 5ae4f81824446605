"""Distillation as a method, in DMD2's order: a student, and a fake network that learns what its images look like.

A step is one update of the student and `fake.updates` of the fake network. Its first iteration rolls the student out, moves
the student, and then trains the fake network on the same images; the others roll out again and train the fake network
alone. DMD2 counts iterations: its 19,000 at a ratio of 5 are 3,800 steps here.

    loss of an update = sum over its images of the loss / images of the update

Processes sum their gradients themselves, since two networks learn in turn: nothing is wrapped.
"""

import math
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from diffalign.config import DistillConfig
from diffalign.pipelines import Backbone
from diffalign.pipelines.few_step import FewStep
from diffalign.training.average import start_average
from diffalign.training.average_decay import decay_of
from diffalign.training.checkpoint import Partner, TrainState
from diffalign.training.device import share_of_step
from diffalign.training.distillation.batch import PromptBatch, make_batch
from diffalign.training.distillation.critic import adversarial_step, critic_step, make_critic
from diffalign.training.distillation.draws import group_shape
from diffalign.training.distillation.policy_gradient import Transition, policy_step
from diffalign.training.distillation.roll_out import roll_out
from diffalign.training.distillation.step import fake_step, student_step
from diffalign.training.finite import FiniteGuard
from diffalign.training.gradient_sum import MetricSums, Network
from diffalign.training.health import OnAlarm
from diffalign.training.order import groups_for_step
from diffalign.training.prompt_source import WAITING_REMEDY
from diffalign.training.protocols import DifferentiableScore, LatentScores, Prompts, RealBatches
from diffalign.training.readme import distill_readme
from diffalign.training.tune import make_trainable

REMEDY = "lower optimizer.lr or fake.optimizer.lr, or match.guidance"


class Distillation:
    """A student with few steps, a frozen teacher and a fake network, which are roles of one backbone.

    scores: rewards of finished latents; differentiable_score: their weighted sum with a gradient; real: what a critic
    compares the student's images with, needed where `config.gan` has a weight. shape: (C, h, w) of a latent.
    """

    on_alarm: OnAlarm | None
    waiting_remedy: str | None = WAITING_REMEDY

    def __init__(
        self,
        config: DistillConfig,
        backbone: Backbone,
        student: FewStep,
        source: Prompts,
        shape: tuple[int, int, int],
        accelerator: Accelerator,
        scores: LatentScores | None = None,
        differentiable_score: DifferentiableScore | None = None,
        real: RealBatches | None = None,
    ) -> None:
        self.config, self.backbone, self.student, self.source = config, backbone, student, source
        self.shape, self.accelerator, self.real = shape, accelerator, real
        self.scores, self.differentiable_score = scores, differentiable_score
        train, self.readme, self.on_alarm = config.train, distill_readme(config), config.on_alarm
        self.finite = FiniteGuard(accelerator.device, config.run_dir, "prompts", REMEDY)
        self.share = share_of_step(train.groups_per_step, train.micro_batch, accelerator, "groups")
        self.update_images = train.groups_per_step * group_shape(config)[0]
        self.waited, self.sums = 0.0, MetricSums()
        self.plain: dict[str, float | Tensor] = {}

        # ---- What trains: the student, and beside it the fake network with the critic's head ----
        make_trainable(backbone, config.tune, config.seed)
        backbone.add_fake(seed=config.seed + 1)
        learnt, fake = backbone.trainable("student"), backbone.trainable("fake")
        self.critic = make_critic(config, backbone, real) if config.gan.weight else None
        if self.critic is not None:
            fake |= {f"critic.{name}": parameter for name, parameter in self.critic.named_parameters()}
        common = (train.steps, train.max_grad_norm, accelerator, self.finite)
        self.learner = Network(learnt, config.optimizer, *common, "student's")
        self.fake = Network(fake, config.fake.optimizer, *common, "fake network's")
        decay = decay_of(train)
        self.state = TrainState(
            learnt, self.learner.optimizer, start_average(learnt, decay), decay,
            partners={"fake": Partner(fake, self.fake.optimizer)},
        )  # fmt: skip

    # --- a step ------------------------------------------------------------------------------------------------

    def step(self, step: int) -> float:
        """Update the student once and the fake network `fake.updates` times; return the seconds of waiting for prompts."""
        config, iterations = self.config, self.config.fake.updates
        self.waited, self.sums, self.plain = 0.0, MetricSums(), {}
        rates = {"lr": self.learner.set_rate(step), "fake_lr": self.fake.set_rate(step)}
        for inner in range(iterations):
            iteration = step * iterations + inner
            indices = groups_for_step(len(self.source), config.train.groups_per_step, iteration, config.seed)

            # ---- Roll out; in the first iteration with a gradient, and the student moves ----
            if inner == 0:
                rolled_out = self._move_student(step, iteration, indices)
            else:
                rolled_out = [self._rolled_out(batch) for batch in self._batches(iteration, indices)]

            # ---- The fake network learns these images, so that it stays the student's score ----
            self._move_fake(step, rolled_out)
        self.plain |= rates
        return self.waited

    def _batches(self, iteration: int, indices: list[int]) -> Iterator[PromptBatch]:
        """Yield this process's micro-batches of an iteration, one by one, so that a GPU computes while the next is drawn."""
        for slots in self.share.micro_batches():
            began, chosen = time.monotonic(), [indices[s] for s in slots]
            batch = make_batch(self.config, self.student, self.source, iteration, slots, chosen, self.shape)
            self.waited += time.monotonic() - began
            yield batch

    def _rolled_out(self, batch: PromptBatch) -> tuple[PromptBatch, Tensor]:
        """Return the batch with the student's images, without a gradient."""
        with self.accelerator.autocast(), torch.no_grad():
            rolled = roll_out(self.backbone, self.student, batch.conditioning, batch.draws, learn=False, finish=False)
        return batch, rolled.x

    def _move_student(self, step: int, iteration: int, indices: list[int]) -> list[tuple[PromptBatch, Tensor]]:
        """Update the student; return the batches with the images that it made."""
        config, rolled_out = self.config, []
        transitions: list[tuple[PromptBatch, Transition]] = []

        # ---- Distribution matching, rewards and critic, micro-batch by micro-batch ----
        for batch in self._batches(iteration, indices):
            adversary = None
            if self.critic is not None and batch.critic_draws is not None:
                adversary = partial(
                    adversarial_step, self.backbone, self.critic, batch.conditioning, batch.critic_draws
                )
            with self.accelerator.autocast():
                output = student_step(
                    config, self.backbone, self.student, batch.conditioning, self.source.unconditional, batch.draws,
                    batch.indices, self.scores, self.differentiable_score, step >= config.reward.start_step, adversary,
                )  # fmt: skip
            self.learner.backward(step, batch.ids, output.loss, self.update_images)
            squared = {"r_dm_squared": output.metrics["r_dm"].square()}
            self.sums.add({"student_loss": output.loss.detach(), **output.metrics, **squared})
            rolled_out.append((batch, output.x))
            if output.transition is not None:
                transitions.append((batch, output.transition))
        self.plain["grad_norm"] = self.learner.update(step)

        # ---- The same roll-outs again, by importance ratios ----
        reuse = config.reward.policy_reuse if transitions else 0
        for _ in range(reuse):
            for batch, transition in transitions:
                with self.accelerator.autocast():
                    loss, ratios = policy_step(config, self.backbone, self.student, batch.conditioning, transition)
                self.learner.backward(step, batch.ids, loss, self.update_images)
                self.sums.add(ratios, share=1 / reuse)
            self.learner.update(step)
        return rolled_out

    def _move_fake(self, step: int, rolled_out: list[tuple[PromptBatch, Tensor]]) -> None:
        """Update the fake network, and the critic's head with it, on the student's images."""
        for batch, x in rolled_out:
            # Gradient checkpointing repeats the forward in backward, and must find the same role there.
            with self.backbone.role("fake"):
                with self.accelerator.autocast():
                    loss, metrics = self._fake_loss(x, batch)
                self.fake.backward(step, batch.ids, loss, self.update_images)
            self.sums.add(metrics, share=1 / self.config.fake.updates)
        self.plain["fake_grad_norm"] = self.fake.update(step)

    def _fake_loss(self, x: Tensor, batch: PromptBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss [N] of the fake network, with the head's where there is one, and metrics of [N]."""
        draws, critic_draws = batch.draws, batch.critic_draws
        if self.critic is None or self.real is None or critic_draws is None:
            error = fake_step(self.backbone, x, batch.conditioning, draws)
            return error, {"fake_loss": error.detach()}
        error, critic_loss, metrics = critic_step(
            self.backbone, self.critic, x, batch.conditioning, draws.fake_noise, draws.fake_times,
            self.real.batch(critic_draws.real), critic_draws,
        )  # fmt: skip
        loss = error + self.config.gan.critic_weight * critic_loss
        return loss, {"fake_loss": error.detach(), "critic_loss": critic_loss.detach(), **metrics}

    # --- what a run reads and saves ----------------------------------------------------------------------------

    def row(self) -> dict[str, float]:
        """Read the last step's metrics: means over its images; of R_dm also the standard error over the prompts."""
        row, groups = self.sums.means(self.accelerator), self.config.train.groups_per_step
        variance = max(row.pop("r_dm_squared") - row["r_dm"] ** 2, 0.0)
        if groups > 1:
            row["r_dm_error"] = math.sqrt(variance / (groups - 1))
        return row | {name: float(value) for name, value in self.plain.items()}

    def save_weights(self, folder: Path) -> None:
        """Write the student in diffusers' format."""
        if self.accelerator.is_main_process:
            self.backbone.save_weights(folder)
