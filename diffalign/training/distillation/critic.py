"""DMD2's discriminator: a small head on the fake network's middle block that tells real images from the student's.

Teacher and student see the teacher's idea of an image only; real ones let a student pass its teacher (DMD2, section 4.4).
The head learns with the fake network, by the same optimiser. Its gradient to the student goes through the fake network at
a re-noised x, and moves neither the head nor the fake network.

DMD2's head is a stack of 4 x 4 convolutions for SDXL's bottleneck. Ours judges every position alone and averages the
logits, so that one head serves UNets, transformers and all sizes.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from diffalign.config import DistillConfig
from diffalign.draws import draw, normal
from diffalign.errors import DiffalignError
from diffalign.objectives.adversarial import critic_loss, generator_loss
from diffalign.pipelines import Backbone, NoiseProcess
from diffalign.pipelines.features import feature_width, predict_with_features
from diffalign.training.device import to_device
from diffalign.training.distillation.draws import stacked, uniform
from diffalign.training.protocols import Conditioning, RealBatches


class Critic(nn.Module):
    """A head on features [N, positions, width] that says how real an image looks: logits [N], mean over positions."""

    def __init__(self, width: int, hidden: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.norm = nn.LayerNorm(width)
        self.inner, self.logit = nn.Linear(width, hidden), nn.Linear(hidden, 1)
        with torch.no_grad():
            for layer in (self.inner, self.logit):
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * layer.in_features**-0.5)
                layer.bias.zero_()

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):  # losses are float32, whatever the trunk computes in
            logits: Tensor = self.logit(nn.functional.silu(self.inner(self.norm(features.float()))))
        return logits.flatten(1).mean(dim=1)


@dataclass(frozen=True)
class CriticDraws:
    """What was drawn for the critic on N = B M images.

    times [N], noise [N, C, h, w]: for the student's update; real_times, real_noise, real [N]: for the real images, and which
    of them are compared with each of the student's. In the critic's update the student's images have the fake network's
    draws.
    """

    times: Tensor
    noise: Tensor
    real_times: Tensor
    real_noise: Tensor
    real: list[int]


def make_critic_draws(
    config: DistillConfig,
    process: NoiseProcess,
    iteration: int,
    slots: list[int],
    prompts: list[str],
    shape: tuple[int, ...],
    images: int,
) -> CriticDraws:
    """Draw as `make_distill_draws` does; the caller takes the numbers of real images modulo how many there are."""
    noise, level, real_noise, real_level, real = ([] for _ in range(5))
    for slot, prompt in zip(slots, prompts, strict=True):
        for member in range(images):

            def one(stream: str, slot: int = slot, prompt: str = prompt, member: int = member) -> np.random.Generator:
                return draw(config.seed, stream, step=iteration, inner=slot, group=prompt, member=member)

            noise.append(normal(one("critic_noise"), shape))
            level.append(one("critic_time").random())
            real_noise.append(normal(one("critic_real_noise"), shape))
            real_level.append(one("critic_real_time").random())
            real.append(int(one("critic_real").integers(2**31)))
    times, real_times = (
        process.draw_times(uniform(levels), **config.fake.times.model_dump()) for levels in (level, real_level)
    )
    return CriticDraws(times, stacked(noise), real_times, stacked(real_noise), real)


def make_critic(config: DistillConfig, backbone: Backbone, real: RealBatches | None) -> Critic:
    """Make a head for features as wide as this backbone's, on its device. Raises DiffalignError without real images."""
    if real is None:
        raise DiffalignError("gan.weight: the critic compares with real images, and none are given; set gan.real")
    latents, conditioning = real.batch([0])
    width = feature_width(backbone, latents.to(backbone.device), conditioning)
    return Critic(width, config.gan.hidden, config.seed + 2).to(backbone.device)


def predict_and_judge(
    backbone: Backbone, critic: nn.Module, x: Tensor, noise: Tensor, t: Tensor, conditioning: Conditioning
) -> tuple[Tensor, Tensor]:
    """Return the fake network's prediction at a noised x, and the critic's logits [N].

    Call it, and backward, inside `role("fake")`.
    """
    noise, t = to_device(noise, x.device), to_device(t, x.device)
    prediction, features = predict_with_features(backbone, backbone.process.add_noise(x, noise, t), t, conditioning)
    return prediction, critic(features)


def adversarial_step(
    backbone: Backbone, critic: nn.Module, conditioning: Conditioning, draws: CriticDraws, x: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the student's adversarial loss [N], without gradient, and its gradient to each x, [N, C, h, w].

    Taken with respect to x alone: DMD2's own code lets the gradients of the fake network and the head gather, and then
    clears them.
    """
    leaf = x.detach().requires_grad_()
    with torch.enable_grad(), backbone.role("fake"):
        _, logits = predict_and_judge(backbone, critic, leaf, draws.noise, draws.times, conditioning)
        loss = generator_loss(logits)
        (slope,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), slope


def critic_step(
    backbone: Backbone,
    critic: nn.Module,
    x: Tensor,
    conditioning: Conditioning,
    noise: Tensor,
    t: Tensor,
    real: tuple[Tensor, Conditioning],
    draws: CriticDraws,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return the fake network's denoising error on the student's images x at noise and t, the critic's loss, both [N], and
    metrics. One pass gives both for x; the real images take another.

    `real`: latents and conditioning, as `RealImages.batch` gives them. Call it, and backward, inside `role("fake")`.
    """
    # ---- The student's images: what the fake network learns, and how real they look ----
    prediction, drawn_logits = predict_and_judge(backbone, critic, x, noise, t, conditioning)
    target = backbone.process.target(x, to_device(noise, x.device), to_device(t, x.device))
    error = (prediction - target).square().flatten(1).mean(dim=1)

    # ---- Real images: how real they look, at levels of their own ----
    latents, real_conditioning = to_device(real[0], x.device), real[1]
    _, real_logits = predict_and_judge(backbone, critic, latents, draws.real_noise, draws.real_times, real_conditioning)
    right = 0.5 * ((drawn_logits < 0).float() + (real_logits > 0).float())
    return error, critic_loss(drawn_logits, real_logits), {"critic_accuracy": right.detach()}
