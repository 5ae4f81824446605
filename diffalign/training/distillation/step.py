"""The distillation step: the student's loss, and the fake network's.

Three networks are roles of one backbone: "student" (what trains), "teacher" (the frozen base), "fake" (trained to denoise
the student's images). All x0 and errors are in float32. Which reading of GNDM and GNDMR this is, and that their text was not
available, stands in `objectives/distribution_matching.py` and `objectives/advantages.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.config import DistillConfig
from diffalign.objectives.advantages import (
    by_spread,
    ca_factor,
    combined,
    exponential_weights,
    gradient_balance,
    standardised,
)
from diffalign.objectives.distribution_matching import matching_loss, normalised
from diffalign.objectives.few_step_policy import log_probability, ppo_loss
from diffalign.pipelines import Backbone, NoiseProcess
from diffalign.pipelines.few_step import FewStep
from diffalign.training.device import to_device
from diffalign.training.distillation.comparison import TeacherAgainstFake, compare, ratio_weight
from diffalign.training.distillation.draws import DistillDraws, group_shape
from diffalign.training.distillation.policy_gradient import Transition, kept_transition
from diffalign.training.distillation.roll_out import roll_out
from diffalign.training.protocols import Conditioning, DifferentiableScore, LatentScores

Adversary = Callable[[Tensor], tuple[Tensor, Tensor]]
"""The student's images -> the adversarial loss [N] without gradient, and its gradient to each image (`critic.py`)."""


@dataclass(frozen=True)
class StudentOutput:
    """A student's step.

    loss [N] with gradient to the student; x [N, C, h, w] detached, for the fake network; metrics [N] each. transition: for
    further updates by PPO, None where the step drew nothing or has no advantage.
    """

    loss: Tensor
    x: Tensor
    metrics: dict[str, Tensor]
    transition: Transition | None = None


def student_step(
    config: DistillConfig,
    backbone: Backbone,
    student: FewStep,
    conditioning: Conditioning,
    unconditional: Conditioning,
    draws: DistillDraws,
    indices: list[int],
    scores: LatentScores | None,
    differentiable_score: DifferentiableScore | None = None,
    rewarded: bool = True,
    adversary: Adversary | None = None,
) -> StudentOutput:
    """Return the student's loss on N = B M images. conditioning: [N, ...]; unconditional: [1, ...]; indices [N] of prompts.

    rewarded: False before `reward.start_step`; then neither rewards nor R_dm count.
    """
    group, reward = config.group, config.reward
    if not rewarded:
        scores = differentiable_score = None

    # ---- Roll out: to the end only where rewards judge the finished image ----
    rolled = roll_out(backbone, student, conditioning, draws, learn=True, finish=scores is not None)
    x = rolled.x

    # ---- Match distributions: teacher against fake network at every re-noising of the image ----
    found = _compared(config, backbone, x, conditioning, unconditional, draws)

    # ---- Rewards: they multiply the guidance by image, or weigh the whole direction ----
    values = scores(rolled.final, indices) if scores is not None else {}
    values = {name: to_device(value, x.device) for name, value in values.items()}
    direction, advantage = _rewarded_direction(config, found, values, rewarded)
    direction = normalised(direction, found.size, group.size, group.axis, group.scale)
    loss = matching_loss(x, direction)

    # ---- PPO on the step's own draw: here the ratio is 1, and its gradient A times that of the log-probability ----
    transition = None
    if reward.policy_weight and rewarded and draws.stop < student.steps - 1:
        log, clip = log_probability(rolled.action, rolled.mean, rolled.rho), reward.policy_clip
        loss = loss + reward.policy_weight * ppo_loss(log, log, advantage, clip, clip)[0]
        transition = kept_transition(draws.stop, rolled.before, rolled.action, rolled.mean, rolled.rho, advantage)

    # ---- Gradient of the rewards: in the last step alone, whose x0 is the finished image ----
    if differentiable_score is not None and draws.stop == student.steps - 1:
        pull = _reward_loss(x, direction, differentiable_score, indices, reward.gradient_balance)
        loss = loss + reward.gradient_weight * pull

    # ---- Real images: the critic's gradient to x, moving neither the critic nor the fake network ----
    metrics = _metrics(config, student.process, draws, found, x, rewarded, advantage, values)
    if adversary is not None:
        adversarial, slope = adversary(x)
        pull = (slope * x).flatten(1).sum(dim=1)
        loss = loss + config.gan.weight * (adversarial + pull - pull.detach())
        metrics["adversarial_loss"] = adversarial
    return StudentOutput(loss, x.detach(), {name: value.detach() for name, value in metrics.items()}, transition)


def _compared(
    config: DistillConfig,
    backbone: Backbone,
    x: Tensor,
    conditioning: Conditioning,
    unconditional: Conditioning,
    draws: DistillDraws,
) -> TeacherAgainstFake:
    """Call `compare` for R re-noisings of each of N images x, side by side."""
    _, renoisings = group_shape(config)
    x = x.detach().repeat_interleave(renoisings, dim=0)
    repeated = {name: value.repeat_interleave(renoisings, dim=0) for name, value in conditioning.items()}
    empty = {name: value.expand(len(x), *value.shape[1:]) for name, value in unconditional.items()}
    return compare(config, backbone, x, repeated, empty, draws)


def _rewarded_direction(
    config: DistillConfig, found: TeacherAgainstFake, values: dict[str, Tensor], rewarded: bool
) -> tuple[Tensor, Tensor]:
    """Return the direction as the rewards change it, and the advantages [N], 0 where there are none."""
    images, renoisings = group_shape(config)
    nothing = torch.zeros_like(found.gap[::renoisings])
    if config.reward.use == "exponential" and values:
        weight = exponential_weights(next(iter(values.values())).view(-1, images))
        return weight.view(-1, 1, 1, 1) * found.guided, nothing
    if rewarded and (values or config.group.advantage != "none"):
        advantage = _advantages(config, values, found.gap, images)
        factor = ca_factor(advantage, config.reward.use, config.reward.strength)
        return found.dm + factor.view(-1, 1, 1, 1) * found.ca, advantage
    return found.guided, nothing


def _advantages(config: DistillConfig, values: dict[str, Tensor], gap: Tensor, images: int) -> Tensor:
    """Return A [N], from scores [N] by reward and R_dm's draw [N]; 0 where there is nothing to compare.

    Images of a prompt share the level, so that R_dm's weight, the same for all of them, falls out when it is standardised.
    """
    rewards = {name: value.view(-1, images) for name, value in values.items()}
    weights = {term.label: term.weight for term in config.reward.terms if term.label in rewards}
    if config.group.advantage == "scalar_rdm":
        rewards["scalar_rdm"], weights["scalar_rdm"] = gap.view(-1, images), config.group.advantage_weight
    if not rewards:
        return torch.zeros_like(gap)
    baseline, clip = config.reward.baseline, config.reward.clip
    if config.reward.weights == "by_spread":
        known = {name: value.nan_to_num(0.0, 0.0, 0.0) for name, value in rewards.items()}
        shares = by_spread(known, weights)
        parts = [shares[name] * standardised(value, baseline) for name, value in rewards.items()]
        return torch.stack(parts).sum(dim=0).clamp(-clip, clip).flatten()
    return combined(rewards, weights, baseline, clip=clip).flatten()


def _reward_loss(
    x: Tensor, direction: Tensor, differentiable_score: DifferentiableScore, indices: list[int], balance: bool
) -> Tensor:
    """Return [N], whose gradient to x is minus the rewards' (ReFL), balanced against the matching loss's if asked."""
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(differentiable_score(leaf, indices).sum(), leaf)
    slope = slope.nan_to_num(0.0, 0.0, 0.0)
    if balance:
        slope = gradient_balance(direction / direction[0].numel(), slope).view(-1, 1, 1, 1) * slope
    return -(slope * x).flatten(1).sum(dim=1)


def _metrics(
    config: DistillConfig,
    process: NoiseProcess,
    draws: DistillDraws,
    found: TeacherAgainstFake,
    x: Tensor,
    rewarded: bool,
    advantage: Tensor,
    values: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Return what is logged of a student's step, [N] each."""
    images, renoisings = group_shape(config)
    parts = {"dm": found.dm, "ca": found.ca}
    metrics = {name: v.abs().flatten(1).mean(1).view(-1, renoisings).mean(1) for name, v in parts.items()}
    metrics["size"] = found.size.view(-1, renoisings).mean(1)
    # A prompt's images share their draw's level, so the prompt is what the error of the mean is over.
    weight = to_device(ratio_weight(process, config, draws.times), x.device) * x[0].numel()
    metrics["r_dm"] = (weight * found.gap).view(-1, config.group.size).mean(1).repeat_interleave(images)
    if images > 1:
        spread = x.detach().unflatten(0, (-1, images)).std(dim=1).flatten(1).mean(1)
        metrics["diversity"] = spread.repeat_interleave(images)
    if rewarded and (values or config.group.advantage != "none"):
        metrics["advantage_size"] = advantage.abs()
    for name, value in values.items():
        metrics["reward" if len(values) == 1 else f"reward/{name}"] = value
    return metrics


def fake_step(backbone: Backbone, x: Tensor, conditioning: Conditioning, draws: DistillDraws) -> Tensor:
    """Return the fake network's denoising error on the student's images x [N, C, h, w], [N]: with the prompt, never guided.

    Call it and its backward inside `backbone.role("fake")`.
    """
    process, device = backbone.process, backbone.device
    t, noise = to_device(draws.fake_times, device), to_device(draws.fake_noise, device)
    prediction = backbone.predict(process.add_noise(x, noise, t), t, conditioning)
    return (prediction - process.target(x, noise, t)).square().flatten(1).mean(dim=1)
