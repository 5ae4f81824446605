"""The reward-gradient step: the sampler unrolled from noise to an image, a gradient through some of its steps.

    x ──(no gradient)──▶ x at step `first` ──(gradient)──▶ x0 of step `stop` ──decode, score──▶ loss

Every method is a choice of `first` and `stop` (`reward_gradient_draws.Span`):
    ReFL       stop is drawn among late steps, first = stop: one prediction, whose x0 is judged before the sampler ends
    DRaFT-K    stop is the last step, first = steps - K; K = steps is DRaFT through the whole chain
    AlignProp  as DRaFT-K, with K drawn anew in every training step
    DRaFT-LV   the sampler ends without a gradient; its image is noised again to the last step's level, several times, and
               each of these takes the last step with a gradient: a mean of several gradients for one roll-out
Other published schemes detach the network's input (DRTune, arXiv:2405.00760): `detach_input`.

The steps are `NoiseProcess.step` at the times of the diffusers pipeline, guidance included, so that training sees the images
that sampling gives. x0, errors and scores are in float32.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffalign.errors import DiffalignError
from diffalign.objectives.distribution_matching import guided
from diffalign.objectives.reward_gradient import RewardTerm, drift, mean_score, reward_loss
from diffalign.training.device import to_device
from diffalign.training.reward_gradient.draws import GradientDraws, Span

Conditioning = dict[str, Tensor]
Scores = Callable[[Tensor, list[int]], dict[str, Tensor]]
"""Latents [N, C, h, w] with a gradient and the prompts' indices [N] -> scores by reward, [N] each, with a gradient."""


@dataclass(frozen=True)
class Sampler:
    """The model's sampler on N images. times [steps + 1], noisiest first; conditioning and empty [N, ...] each.

    scale: classifier-free guidance; as in the pipelines, 1 or less is none, and so it is where the scale is an input of the
    network.
    """

    backbone: Any
    times: Tensor
    conditioning: Conditioning
    empty: Conditioning
    scale: float

    def predict(self, role: str, x: Tensor, index: int) -> Tensor:
        """The guided prediction of `role` at x [N, C, h, w] and step `index`."""
        backbone = self.backbone
        t = self.times[index].expand(len(x)).to(x.device)
        with backbone.role(role):
            if backbone.guided or self.scale <= 1.0:
                plain: Tensor = backbone.predict(x, t, self.conditioning)
                return plain
            # One pass over both halves, as the pipelines make it.
            both = {name: torch.cat([self.empty[name], value]) for name, value in self.conditioning.items()}
            without, with_prompt = backbone.predict(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
            return guided(with_prompt, without, self.scale)

    def onward(self, x: Tensor, prediction: Tensor, index: int, judged: bool = False) -> Tensor:
        """The latent after step `index`; `judged`: the x0 that it points to, which for the last step is where it ends."""
        t = self.times[index].expand(len(x)).to(x.device)
        if judged and index < len(self.times) - 2:
            image: Tensor = self.backbone.process.x0(x, prediction, t)
            return image
        after = self.times[index + 1].expand(len(x)).to(x.device)
        stepped: Tensor = self.backbone.process.step(x, prediction, t, after)
        return stepped

    @torch.no_grad()
    def roll(self, x: Tensor, steps: int) -> Tensor:
        """The policy's first `steps` steps from x, without a gradient."""
        for index in range(steps):
            x = self.onward(x, self.predict("policy", x, index), index)
        # Autocast keeps casts of weights; those made here, without gradient, must not serve the steps that learn.
        torch.clear_autocast_cache()
        return x


def learnt_step(
    sampler: Sampler, x: Tensor, index: int, judged: bool, *, detach_input: bool, measure: bool, penalised: bool
) -> tuple[Tensor, Tensor]:
    """The latent after step `index` [N, C, h, w] and the policy's drift there [N], with gradient; drift 0 if not measured.

    The reference comes first: switching adapters between a forward and its backward loses gradients. Where the drift is
    penalised the gradient also reaches the latent through the reference, so that it is that of the penalty at the latents
    that the policy visits.
    """
    seen = x.detach() if detach_input else x
    gap = torch.zeros(len(x), device=x.device)
    reference = None
    if measure or penalised:
        followed = penalised and torch.is_grad_enabled() and seen.requires_grad
        with torch.set_grad_enabled(followed), sampler.backbone.whole_graph() if followed else nullcontext():
            reference = sampler.predict("reference", seen, index)
    prediction = sampler.predict("policy", seen, index)
    if reference is not None:
        gap = drift(prediction if penalised else prediction.detach(), reference)
    return sampler.onward(x, prediction, index, judged), gap


@dataclass(frozen=True)
class StepOutput:
    """loss [N] with gradient to the policy; metrics [N] each; image [N R, C, h, w]: the latents that were judged."""

    loss: Tensor
    metrics: dict[str, Tensor]
    image: Tensor


def reward_gradient_step(
    config: Any,
    backbone: Any,
    times: Tensor,
    conditioning: Conditioning,
    unconditional: Conditioning,
    draws: GradientDraws,
    span: Span,
    indices: list[int],
    scores: Scores,
) -> StepOutput:
    """Loss and metrics of N images. conditioning: [N, ...]; unconditional: [1, ...]; indices [N] of the prompts.

    Raises DiffalignError where a score carries no gradient to the image.
    """
    method, device = config.method, backbone.device
    copies = method.noises if method.name == "draft_lv" else 1

    def sampler(repeats: int) -> Sampler:
        seen = {name: value.repeat_interleave(repeats, dim=0) for name, value in conditioning.items()}
        count = len(draws.noise) * repeats
        empty = {name: value.expand(count, *value.shape[1:]) for name, value in unconditional.items()}
        return Sampler(backbone, times, seen, empty, config.sampler.guidance_scale)

    # ---- To the first step with a gradient ----
    x = backbone.process.initial(to_device(draws.noise, device))
    if draws.renoise is not None:
        image = sampler(1).roll(x, len(times) - 1).repeat_interleave(copies, dim=0)
        t = times[span.first].expand(len(image)).to(device)
        x = backbone.process.add_noise(image, to_device(draws.renoise, device), t)
    else:
        x = sampler(1).roll(x, span.first)

    # ---- Through the steps that learn ----
    learning = sampler(copies)
    penalised = config.drift.weight > 0
    gaps = []
    for index in range(span.first, span.stop + 1):

        def forward(x: Tensor, index: int = index) -> tuple[Tensor, Tensor]:
            return learnt_step(
                learning, x, index, index == span.stop,
                detach_input=method.name != "draft_lv" and method.detach_input,
                measure=config.drift.measure, penalised=penalised,
            )  # fmt: skip

        if config.sampler.checkpointing:
            x, gap = checkpoint(forward, x, use_reentrant=False, preserve_rng_state=False)
        else:
            x, gap = forward(x)
        gaps.append(gap)

    # ---- Judge ----
    with torch.autocast(device.type, enabled=False):
        values = {name: value.float() for name, value in scores(x, [i for i in indices for _ in range(copies)]).items()}
    for name, value in values.items():
        if not value.requires_grad:
            raise DiffalignError(
                f"rewards: the score of {name} carries no gradient to the image, so there is nothing to learn from it; "
                "something in it detaches, rounds to 8 bits or runs without gradients"
            )
    terms = {term.label: RewardTerm(term.weight, term.form, term.threshold) for term in config.rewards}
    loss = reward_loss(values, terms)
    moved = torch.stack(gaps).mean(dim=0)
    metrics = {"reward": mean_score(values, terms)}
    if penalised:
        loss = loss + config.drift.weight * moved
    if config.drift.measure or penalised:
        metrics["drift"] = moved
    if len(values) > 1:
        metrics |= {f"reward/{name}": value for name, value in values.items()}
    if any(term.threshold is not None for term in terms.values()):
        above = [values[n] >= term.threshold for n, term in terms.items() if term.threshold is not None]
        metrics["above_threshold"] = torch.stack(above).float().mean(dim=0)

    def by_image(value: Tensor) -> Tensor:
        return value.view(-1, copies).mean(dim=1)

    return StepOutput(by_image(loss), {k: by_image(v.detach()) for k, v in metrics.items()}, x)
