"""The distillation step: the student's roll-out, its loss, and the fake network's.

Three networks are roles of one backbone: "student" (what trains), "teacher" (the frozen base), "fake" (trained to denoise
the student's images). All x0 and errors are in float32. Which reading of GNDM and GNDMR this is, and that their text was not
available, stands in `objectives/distribution_matching.py` and `objectives/advantages.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffalign.objectives.advantages import (
    by_spread,
    ca_factor,
    combined,
    exponential_weights,
    gradient_balance,
    standardised,
)
from diffalign.objectives.distribution_matching import guided, matching_loss, mean_size, normalised, split_direction
from diffalign.objectives.few_step_policy import log_probability, ppo_loss
from diffalign.pipelines.few_step import FewStep
from diffalign.pipelines.process import NoiseProcess
from diffalign.training.device import to_device
from diffalign.training.distillation.draws import DistillDraws, group_shape
from diffalign.training.distillation.policy_gradient import Transition, kept_transition

Conditioning = dict[str, Tensor]
Judge = Callable[[Tensor, list[int]], dict[str, Tensor]]
"""Finished latents [N, C, h, w] and the prompts' indices [N] -> scores by reward, [N] each, NaN where there is none."""
Lean = Callable[[Tensor, list[int]], Tensor]
"""Finished latents with a gradient and the prompts' indices -> the weighted score [N] of the differentiable rewards."""
Against = Callable[[Tensor], tuple[Tensor, Tensor]]
"""The student's images -> the adversarial loss [N] without gradient, and its gradient to each image (`critic.py`)."""


@dataclass(frozen=True)
class RollOut:
    """x [N, C, h, w]: the image after the step that learns, with its gradient; final: after all steps, without.

    before, mean [N, C, h, w] (with its gradient), rho [N], action: the transition that the step makes, rho 0 where it draws
    nothing.
    """

    x: Tensor
    final: Tensor
    before: Tensor
    mean: Tensor
    rho: Tensor
    action: Tensor


def roll_out(
    backbone: Any, student: FewStep, conditioning: Conditioning, draws: DistillDraws, *, learn: bool, finish: bool
) -> RollOut:
    """The student from noise to its step `draws.stop`, as it samples (backward simulation, DMD2 section 4.5).

    Only that step carries a gradient, and only if `learn`; what comes before is the student's own doing, not noised data,
    so that training sees what inference sees. `finish`: go on to the end, for rewards.
    """
    device = backbone.device
    x = to_device(draws.noise[:, 0], device).float()  # unit noise, whatever the base's own sampler starts from

    def predict(x: Tensor, index: int) -> Tensor:
        with backbone.role("student"):
            prediction: Tensor = backbone.predict(x, student.at(index, x), conditioning)
        return prediction

    def advance(x: Tensor, prediction: Tensor, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and deviation of the next latent, and the latent."""
        mean, rho = student.transition(x, prediction, index)
        if not student.stochastic or index == student.steps - 1:
            return mean, rho, mean
        return mean, rho, student.advance(x, prediction, index, to_device(draws.noise[:, index + 1], device))

    with torch.no_grad():
        for index in range(draws.stop):
            x = advance(x, predict(x, index), index)[2]
    # Autocast keeps casts of weights; those made here, without gradient, must not serve the step that learns.
    torch.clear_autocast_cache()
    with torch.set_grad_enabled(learn):
        prediction = predict(x, draws.stop)
        image = student.process.x0(x, prediction, student.at(draws.stop, x))
        mean, rho, onward = advance(x, prediction, draws.stop)
    final = onward.detach()
    if finish:
        with torch.no_grad():
            for index in range(draws.stop + 1, student.steps):
                final = advance(final, predict(final, index), index)[2]
        torch.clear_autocast_cache()
    return RollOut(image, final, x, mean, rho, onward.detach())


@dataclass(frozen=True)
class Compared:
    """dm, ca, guided [N R, C, h, w]: the two parts and the whole; size [N R]; gap [N R]: fake's epsilon error less the
    un-guided teacher's, mean over elements."""

    dm: Tensor
    ca: Tensor
    guided: Tensor
    size: Tensor
    gap: Tensor


def ratio_weight(process: NoiseProcess, match: Any, t: Tensor) -> Tensor:
    """What an epsilon error at time t counts in R_dm, [N]: 1/2 |dlambda/du| (high - low), u being drawn uniformly. On the CPU.

    u is the share of the time axis before the shift; lambda = log(a^2 / s^2) is differentiated over a thousandth of the
    axis. R_dm is then an integral from `match.low` to `match.high` alone.
    """
    span, times = process.span, t
    h = span / 1000

    def snr(at: Tensor) -> Tensor:
        a, s = process.coefficients(at)
        return 2.0 * (a.double() / s.double()).log()

    top = span - (0.0 if span > 1 else h / 2)
    low, high = (times - h / 2).clamp_min(h / 2 if span == 1.0 else 0.0), (times + h / 2).clamp_max(top)
    slope = (snr(low) - snr(high)) / (high - low).double()
    shift = process.shift if match.shift is None else match.shift
    fraction = times.double() / span
    by_share = span * (shift - (shift - 1.0) * fraction) ** 2 / shift  # dt/du
    return (0.5 * slope * by_share * (match.high - match.low)).float()


def compare(
    config: Any, backbone: Any, x: Tensor, conditioning: Conditioning, empty: Conditioning, draws: DistillDraws
) -> Compared:
    """Teacher and fake at a re-noised x [N R, C, h, w]; no gradient. `guided` is the whole direction as DMD2 has it."""
    process, device, w = backbone.process, backbone.device, config.match.guidance

    def look(role: str, noisy: Tensor, t: Tensor, seen: Conditioning) -> tuple[Tensor, Tensor]:
        """x0 and epsilon as `role` predicts them."""
        with backbone.role(role):
            prediction = backbone.predict(noisy, t, seen)
        return process.x0(noisy, prediction, t), process.epsilon(noisy, prediction, t)

    with torch.no_grad():
        t, noise = to_device(draws.times, device), to_device(draws.renoise, device)
        noisy = process.add_noise(x, noise, t)
        fake, fake_epsilon = look("fake", noisy, t, conditioning)
        teacher, teacher_epsilon = look("teacher", noisy, t, conditioning)
        errors = [(e - noise).square().flatten(1).mean(dim=1) for e in (fake_epsilon, teacher_epsilon)]
        gap = errors[0] - errors[1]
        if config.match.decoupled and w != 1.0:
            t_ca = to_device(draws.guidance_times, device)
            noisy_ca = process.add_noise(x, to_device(draws.guidance_noise, device), t_ca)
            with_prompt, _ = look("teacher", noisy_ca, t_ca, conditioning)
            without, _ = look("teacher", noisy_ca, t_ca, empty)
            _, ca = split_direction(with_prompt, without, with_prompt, w)
            # Ours: each part is measured by its own level's size, since the sizes of two levels cannot be compared. DM
            # keeps `size`, so CA is brought to it.
            size = mean_size(x, teacher)
            own = mean_size(x, guided(with_prompt, without, w))
            ca = ca * (size / own.clamp_min(1e-12)).view(-1, 1, 1, 1)
            return Compared(teacher - fake, ca, teacher - fake + ca, size, gap)
        without = look("teacher", noisy, t, empty)[0] if w != 1.0 else teacher
        dm, ca = split_direction(teacher, without, fake, w)
        target = guided(teacher, without, w)
        return Compared(dm, ca, target - fake, mean_size(x, target), gap)


def _advantages(config: Any, scores: dict[str, Tensor], gap: Tensor, images: int) -> Tensor:
    """A [N], from scores [N] by reward and R_dm's draw [N]; 0 where there is nothing to compare.

    Images of a prompt share the level, so that R_dm's weight, the same for all of them, falls out when it is standardised.
    """
    rewards = {name: values.view(-1, images) for name, values in scores.items()}
    weights = {term.label: term.weight for term in config.reward.terms if term.label in rewards}
    if config.group.advantage == "scalar_rdm":
        rewards["scalar_rdm"], weights["scalar_rdm"] = gap.view(-1, images), config.group.advantage_weight
    if not rewards:
        return torch.zeros_like(gap)
    baseline, clip = config.reward.baseline, config.reward.clip
    if config.reward.weights == "by_spread":
        known = {name: values.nan_to_num(0.0, 0.0, 0.0) for name, values in rewards.items()}
        shares = by_spread(known, weights)
        parts = [shares[name] * standardised(values, baseline) for name, values in rewards.items()]
        return torch.stack(parts).sum(dim=0).clamp(-clip, clip).flatten()
    return combined(rewards, weights, baseline, clip=clip).flatten()


def _reward_loss(x: Tensor, onward: Tensor, lean: Lean, indices: list[int], balance: bool) -> Tensor:
    """[N], whose gradient to x is minus the rewards' (ReFL), balanced against the matching loss's if asked."""
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(lean(leaf, indices).sum(), leaf)
    slope = slope.nan_to_num(0.0, 0.0, 0.0)
    if balance:
        slope = gradient_balance(onward / onward[0].numel(), slope).view(-1, 1, 1, 1) * slope
    return -(slope * x).flatten(1).sum(dim=1)


@dataclass(frozen=True)
class StudentOutput:
    """loss [N] with gradient to the student; x [N, C, h, w] detached, for the fake network; metrics [N] each.

    kept: the transition for further updates by PPO, None where the step drew nothing or has no advantage.
    """

    loss: Tensor
    x: Tensor
    metrics: dict[str, Tensor]
    kept: Transition | None = None


def student_step(
    config: Any,
    backbone: Any,
    student: FewStep,
    conditioning: Conditioning,
    unconditional: Conditioning,
    draws: DistillDraws,
    indices: list[int],
    judge: Judge | None,
    lean: Lean | None = None,
    rewarded: bool = True,
    against: Against | None = None,
) -> StudentOutput:
    """The student's loss on N = B M images. conditioning: [N, ...]; unconditional: [1, ...]; indices [N] of the prompts.

    `rewarded`: False before `reward.start_step`; then neither rewards nor R_dm have a say.
    """
    images, renoisings = group_shape(config.group)
    judge, lean = (judge, lean) if rewarded else (None, None)
    rolled = roll_out(backbone, student, conditioning, draws, learn=True, finish=judge is not None)
    x = rolled.x
    again = x.detach().repeat_interleave(renoisings, dim=0)
    seen = {name: value.repeat_interleave(renoisings, dim=0) for name, value in conditioning.items()}
    empty = {name: value.expand(len(again), *value.shape[1:]) for name, value in unconditional.items()}
    found = compare(config, backbone, again, seen, empty, draws)

    # ---- What rewards make of it ----
    scores = judge(rolled.final, indices) if judge is not None else {}
    scores = {name: to_device(values, x.device) for name, values in scores.items()}
    direction = found.guided
    advantage = torch.zeros(len(x), device=x.device)
    if config.reward.use == "exponential" and scores:
        weight = exponential_weights(next(iter(scores.values())).view(-1, images))
        direction = weight.view(-1, 1, 1, 1) * direction
    elif rewarded and (scores or config.group.advantage != "none"):
        advantage = _advantages(config, scores, found.gap, images)
        factor = ca_factor(advantage, config.reward.use, config.reward.strength)
        direction = found.dm + factor.view(-1, 1, 1, 1) * found.ca

    group = config.group
    onward = normalised(direction, found.size, group.size, group.axis, group.scale)
    loss = matching_loss(x, onward)
    kept = None
    if config.reward.policy_weight and rewarded and draws.stop < student.steps - 1:
        # In this update the ratio is 1, and its gradient A times that of the log-probability.
        log, clip = log_probability(rolled.action, rolled.mean, rolled.rho), config.reward.policy_clip
        loss = loss + config.reward.policy_weight * ppo_loss(log, log, advantage, clip, clip)[0]
        kept = kept_transition(draws.stop, rolled.before, rolled.action, rolled.mean, rolled.rho, advantage)
    if lean is not None and draws.stop == student.steps - 1:
        loss = loss + config.reward.gradient_weight * _reward_loss(
            x, onward, lean, indices, config.reward.gradient_balance
        )
    if against is not None:
        adversarial, slope = against(x)
        pull = (slope * x).flatten(1).sum(dim=1)
        loss = loss + config.gan.weight * (adversarial + pull - pull.detach())
    per_image = {"dm": found.dm, "ca": found.ca}
    metrics = {name: v.abs().flatten(1).mean(1).view(-1, renoisings).mean(1) for name, v in per_image.items()}
    metrics["size"] = found.size.view(-1, renoisings).mean(1)
    # A prompt's images share their draw's level, so the prompt is what the error of the mean is over.
    weight = to_device(ratio_weight(student.process, config.match, draws.times), x.device) * x[0].numel()
    metrics["r_dm"] = (weight * found.gap).view(-1, group.size).mean(1).repeat_interleave(images)
    if against is not None:
        metrics["adversarial_loss"] = adversarial
    if images > 1:
        spread = x.detach().unflatten(0, (-1, images)).std(dim=1).flatten(1).mean(1)
        metrics["diversity"] = spread.repeat_interleave(images)
    if rewarded and (scores or group.advantage != "none"):
        metrics["advantage_size"] = advantage.abs()
    for name, values in scores.items():
        metrics["reward" if len(scores) == 1 else f"reward/{name}"] = values
    return StudentOutput(loss, x.detach(), {name: value.detach() for name, value in metrics.items()}, kept)


def fake_step(backbone: Any, x: Tensor, conditioning: Conditioning, draws: DistillDraws) -> Tensor:
    """The fake network's denoising error on the student's images x [N, C, h, w], [N]: with the prompt, never guided.

    Call it and its backward inside `backbone.role("fake")`.
    """
    process = backbone.process
    t, noise = to_device(draws.fake_times, backbone.device), to_device(draws.fake_noise, backbone.device)
    prediction = backbone.predict(process.add_noise(x, noise, t), t, conditioning)
    return (prediction - process.target(x, noise, t)).square().flatten(1).mean(dim=1)
