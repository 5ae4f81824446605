"""The reward-gradient step: the sampler unrolled from noise to an image, a gradient through some of its steps.

    x ──(no gradient)──▶ x at step `first` ──(gradient)──▶ x0 of step `stop` ──decode, score──▶ loss

Every method is a choice of `first` and `stop` (`draws.Span`):
    ReFL       stop is drawn among late steps, first = stop: one prediction, whose x0 is judged before the sampler ends
    DRaFT-K    stop is the last step, first = steps - K; K = steps is DRaFT through the whole chain
    AlignProp  as DRaFT-K, with a new K drawn in every training step
    DRaFT-LV   the sampler ends without a gradient; its image is noised again to the last step's level, several times, and
               each of these takes the last step with a gradient: a mean of several gradients for one roll-out
Other published schemes detach the network's input (DRTune, arXiv:2405.00760): `detach_input`.

The steps are `NoiseProcess.step` at the times of the diffusers pipeline, guidance included, so that training sees the images
that sampling gives. x0, errors and scores are in float32.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffalign.config import RewardGradientConfig
from diffalign.errors import DiffalignError
from diffalign.objectives.distribution_matching import guided
from diffalign.objectives.reward_gradient import RewardTerm, drift, mean_score, reward_loss
from diffalign.pipelines import Backbone
from diffalign.training.device import to_device
from diffalign.training.protocols import Conditioning, LatentScores
from diffalign.training.reward_gradient.draws import GradientDraws, Span


@dataclass(frozen=True)
class UnrolledSampler:
    """The model's sampler on N images, step by step. times [steps + 1], noisiest first; conditioning, empty [N, ...] each.

    stops [steps]: the times to whose noise levels the steps lead; None: the next of `times`. scale: classifier-free guidance;
    as in the pipelines, 1 or less is none, and so it is where the scale is an input of the network.
    """

    backbone: Backbone
    times: Tensor
    conditioning: Conditioning
    empty: Conditioning
    scale: float
    stops: Tensor | None = None

    def predict(self, role: str, x: Tensor, index: int) -> Tensor:
        """Return the guided prediction of `role` at x [N, C, h, w] and step `index`."""
        backbone, t = self.backbone, self._at(index, x)
        with backbone.role(role):
            if backbone.guided or self.scale <= 1.0:
                return backbone.predict(x, t, self.conditioning)
            # One pass over both halves, as the pipelines make it.
            both = {name: torch.cat([self.empty[name], value]) for name, value in self.conditioning.items()}
            without, with_prompt = backbone.predict(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
            return backbone.rescale_guided(guided(with_prompt, without, self.scale), with_prompt)

    def advance(self, x: Tensor, prediction: Tensor, index: int, judged: bool = False) -> Tensor:
        """Return the latent after step `index`; `judged`: the x0 that it points to, where the last step ends anyway."""
        process, t = self.backbone.process, self._at(index, x)
        if judged and index < len(self.times) - 2:
            return process.x0(x, prediction, t)
        stops = self.times[1:] if self.stops is None else self.stops
        return process.step(x, prediction, t, stops[index].expand(len(x)).to(x.device))

    def _at(self, index: int, x: Tensor) -> Tensor:
        """Return the time of step `index` for each latent, [N]."""
        return self.times[index].expand(len(x)).to(x.device)

    @torch.no_grad()
    def roll(self, x: Tensor, steps: int) -> Tensor:
        """Take the policy's first `steps` steps from x, without a gradient."""
        for index in range(steps):
            x = self.advance(x, self.predict("policy", x, index), index)
        # Autocast keeps casts of weights; those made here, without gradient, must not serve the steps that learn.
        torch.clear_autocast_cache()
        return x


def learnt_step(
    sampler: UnrolledSampler,
    x: Tensor,
    index: int,
    judged: bool,
    *,
    detach_input: bool,
    measure: bool,
    penalised: bool,
) -> tuple[Tensor, Tensor]:
    """Return the latent after step `index` [N, C, h, w] and the policy's drift there [N], both with gradient.

    The reference comes first: switching adapters between a forward and its backward loses gradients. Where the drift is
    penalised the gradient also reaches the latent through the reference, so that it is that of the penalty at the latents
    that the policy visits. Where nothing is measured the drift is 0.
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
    return sampler.advance(x, prediction, index, judged), gap


@dataclass(frozen=True)
class RewardGradientOutput:
    """A step's result: loss [N] with gradient to the policy; metrics [N] each; image [N R, C, h, w]: the judged latents."""

    loss: Tensor
    metrics: dict[str, Tensor]
    image: Tensor


def reward_gradient_step(
    config: RewardGradientConfig,
    backbone: Backbone,
    times: Tensor,
    conditioning: Conditioning,
    unconditional: Conditioning,
    draws: GradientDraws,
    span: Span,
    indices: list[int],
    scores: LatentScores,
    stops: Tensor | None = None,
) -> RewardGradientOutput:
    """Return loss and metrics of N images. conditioning: [N, ...]; unconditional: [1, ...]; indices [N] of the prompts.

    times, stops: as `UnrolledSampler` has them.
    Raises DiffalignError where a score carries no gradient to the image.
    """
    method, device = config.method, backbone.device
    copies = method.noises if method.name == "draft_lv" else 1

    def sampler(repeats: int) -> UnrolledSampler:
        repeated = {name: value.repeat_interleave(repeats, dim=0) for name, value in conditioning.items()}
        count = len(draws.noise) * repeats
        empty = {name: value.expand(count, *value.shape[1:]) for name, value in unconditional.items()}
        return UnrolledSampler(backbone, times, repeated, empty, config.sampler.guidance_scale, stops)

    # ---- To the first step with a gradient; DRaFT-LV goes to the end, and back by fresh noises ----
    x = backbone.process.initial(to_device(draws.noise, device))
    if draws.renoise is not None:
        image = sampler(1).roll(x, len(times) - 1).repeat_interleave(copies, dim=0)
        t = times[span.first].expand(len(image)).to(device)
        x = backbone.process.add_noise(image, to_device(draws.renoise, device), t)
    else:
        x = sampler(1).roll(x, span.first)

    # ---- Through the steps that learn ----
    x, moved = _learn(config, sampler(copies), x, span)

    # ---- Judge the image, in float32 ----
    with torch.autocast(device.type, enabled=False):
        values = {name: value.float() for name, value in scores(x, [i for i in indices for _ in range(copies)]).items()}
    _check_gradients(values)

    # ---- Loss: the rewards', and what holds the policy at the reference ----
    terms = {term.label: RewardTerm(term.weight, term.form, term.threshold) for term in config.rewards}
    loss = reward_loss(values, terms)
    if config.drift.weight > 0:
        loss = loss + config.drift.weight * moved
    metrics = _metrics(values, terms) | ({"drift": moved} if _measured(config) else {})

    def by_image(value: Tensor) -> Tensor:
        return value.view(-1, copies).mean(dim=1)

    return RewardGradientOutput(by_image(loss), {k: by_image(v.detach()) for k, v in metrics.items()}, x)


def _measured(config: RewardGradientConfig) -> bool:
    """Return whether the reference's predictions are needed."""
    return config.drift.measure or config.drift.weight > 0


def _learn(config: RewardGradientConfig, sampler: UnrolledSampler, x: Tensor, span: Span) -> tuple[Tensor, Tensor]:
    """Return the latent after the steps of `span`, with its gradient, and the mean drift over them, [N]."""
    method, drifts = config.method, []
    for index in range(span.first, span.stop + 1):

        def forward(x: Tensor, index: int = index) -> tuple[Tensor, Tensor]:
            return learnt_step(
                sampler, x, index, index == span.stop,
                detach_input=method.name != "draft_lv" and method.detach_input,
                measure=config.drift.measure, penalised=config.drift.weight > 0,
            )  # fmt: skip

        # A step then keeps its input alone and is computed again in the backward pass.
        if config.sampler.checkpointing:
            x, gap = checkpoint(forward, x, use_reentrant=False, preserve_rng_state=False)
        else:
            x, gap = forward(x)
        drifts.append(gap)
    return x, torch.stack(drifts).mean(dim=0)


def _check_gradients(values: dict[str, Tensor]) -> None:
    """Refuse a score that has no gradient to the image."""
    for name, value in values.items():
        if not value.requires_grad:
            raise DiffalignError(
                f"rewards: the score of {name} carries no gradient to the image, so there is nothing to learn from it; "
                "something in it detaches, rounds to 8 bits or runs without gradients"
            )


def _metrics(values: dict[str, Tensor], terms: dict[str, RewardTerm]) -> dict[str, Tensor]:
    """Return what is logged of the scores, [N] each."""
    metrics = {"reward": mean_score(values, terms)}
    if len(values) > 1:
        metrics |= {f"reward/{name}": value for name, value in values.items()}
    if any(term.threshold is not None for term in terms.values()):
        above = [values[n] >= term.threshold for n, term in terms.items() if term.threshold is not None]
        metrics["above_threshold"] = torch.stack(above).float().mean(dim=0)
    return metrics
