"""Training on the gradient of rewards as a method (`diffalign reward-gradient`).

A step draws an image for each of `images_per_step` prompts, follows the gradient of their rewards back into the policy's
weights, and updates them:

    loss of the step = sum over its images of the loss / images_per_step

so neither accumulation nor the number of processes can change it.
"""

import time
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from diffalign.config import RewardGradientConfig
from diffalign.pipelines import Backbone
from diffalign.training.average import start_average
from diffalign.training.average_decay import decay_of
from diffalign.training.checkpoint import TrainState
from diffalign.training.device import share_of_step
from diffalign.training.finite import FiniteGuard
from diffalign.training.gradient_sum import MetricSums, Network
from diffalign.training.health import OnAlarm
from diffalign.training.order import groups_for_step
from diffalign.training.prompt_source import WAITING_REMEDY
from diffalign.training.protocols import LatentScores, Prompts
from diffalign.training.readme import reward_gradient_readme
from diffalign.training.reward_gradient.draws import make_gradient_draws, span_of
from diffalign.training.reward_gradient.step import reward_gradient_step
from diffalign.training.tune import make_trainable

REMEDY = "lower optimizer.lr, the rewards' weights, or the number of steps with a gradient"


class RewardGradient:
    """A policy that learns from the gradient of differentiable rewards.

    scores: decodes and judges latents, with a gradient; shape: (C, h, w) of a latent.
    """

    on_alarm: OnAlarm | None
    waiting_remedy: str | None = WAITING_REMEDY

    def __init__(
        self,
        config: RewardGradientConfig,
        backbone: Backbone,
        source: Prompts,
        shape: tuple[int, int, int],
        scores: LatentScores,
        accelerator: Accelerator,
    ) -> None:
        self.config, self.backbone, self.source = config, backbone, source
        self.shape, self.scores, self.accelerator = shape, scores, accelerator
        train, side = config.train, backbone.vae_scale_factor
        self.readme, self.on_alarm = reward_gradient_readme(config), config.on_alarm
        self.finite = FiniteGuard(accelerator.device, config.run_dir, "prompts", REMEDY)
        self.share = share_of_step(train.images_per_step, train.micro_batch, accelerator, "images")
        found = backbone.sampler_steps(config.sampler.steps, shape[1] * side, shape[2] * side)
        self.times, self.stops = torch.cat([found.times, found.stops[-1:]]), found.stops
        reference = config.drift.measure or config.drift.weight > 0
        make_trainable(backbone, config.tune, config.seed, keep_reference=reference)
        policy = backbone.trainable()
        self.policy = Network(policy, config.optimizer, train.steps, train.max_grad_norm, accelerator, self.finite)
        decay = decay_of(train)
        self.state = TrainState(policy, self.policy.optimizer, start_average(policy, decay), decay)
        self.sums = MetricSums()
        self.plain: dict[str, float | Tensor] = {}

    def step(self, step: int) -> float:
        """Update the policy on the images of `step`; return the seconds of waiting for prompts and noise."""
        config, waited, self.sums = self.config, 0.0, MetricSums()
        rate = self.policy.set_rate(step)
        indices = groups_for_step(len(self.source), config.train.images_per_step, step, config.seed)
        span = span_of(config, step)

        # ---- Draw, judge and follow back, micro-batch by micro-batch ----
        for slots in self.share.micro_batches():
            chosen = [indices[s] for s in slots]
            ids = [self.source.ids[i] for i in chosen]
            began = time.monotonic()
            conditioning = self.source.batch(chosen)
            draws = make_gradient_draws(config, step, slots, ids, self.shape)
            waited += time.monotonic() - began
            with self.accelerator.autocast():
                output = reward_gradient_step(
                    config, self.backbone, self.times, conditioning, self.source.unconditional, draws, span, chosen,
                    self.scores, self.stops,
                )  # fmt: skip
            self.policy.backward(step, ids, output.loss, config.train.images_per_step)
            self.sums.add({"loss": output.loss.detach(), **output.metrics})

        # ---- Update: processes sum their gradients themselves, since the graph runs through several passes ----
        norm = self.policy.update(step)
        where = {"judged_step": float(span.stop), "gradient_steps": float(span.length)}
        self.plain = {"grad_norm": norm, "lr": rate, **where}
        return waited

    def row(self) -> dict[str, float]:
        """Read the last step's metrics: means over its images."""
        return self.sums.means(self.accelerator) | {name: float(value) for name, value in self.plain.items()}

    def save_weights(self, folder: Path) -> None:
        """Write the policy in diffusers' format."""
        if self.accelerator.is_main_process:
            self.backbone.save_weights(folder)
