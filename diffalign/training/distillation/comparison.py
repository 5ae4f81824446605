"""Teacher against fake network at re-noised images: the direction in which distribution matching moves the student."""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.config import DistillConfig
from diffalign.objectives.distribution_matching import guided, mean_size, split_direction
from diffalign.pipelines import Backbone, NoiseProcess
from diffalign.training.device import to_device
from diffalign.training.distillation.draws import DistillDraws
from diffalign.training.protocols import Conditioning


@dataclass(frozen=True)
class TeacherAgainstFake:
    """How teacher and fake network differ at N R re-noised images.

    dm, ca, guided [N R, C, h, w]: the two parts of the direction and the whole; size [N R]: what it is normalised by; gap [N
    R]: the fake network's epsilon error less the un-guided teacher's, mean over elements.
    """

    dm: Tensor
    ca: Tensor
    guided: Tensor
    size: Tensor
    gap: Tensor


def ratio_weight(process: NoiseProcess, config: DistillConfig, t: Tensor) -> Tensor:
    """Return what an epsilon error at time t [N] counts in R_dm, [N] on the CPU: 1/2 |dlambda/du| (high - low).

    u, drawn uniformly, is the share of the time axis before the shift; lambda = log(a^2 / s^2) is differentiated over a
    thousandth of the axis. R_dm is then an integral from `match.low` to `match.high` alone.
    """
    span, match = process.span, config.match
    h = span / 1000

    def snr(at: Tensor) -> Tensor:
        a, s = process.coefficients(at)
        return 2.0 * (a.double() / s.double()).log()

    top = span - (0.0 if span > 1 else h / 2)
    low, high = (t - h / 2).clamp_min(h / 2 if span == 1.0 else 0.0), (t + h / 2).clamp_max(top)
    slope = (snr(low) - snr(high)) / (high - low).double()
    shift = process.shift if match.shift is None else match.shift
    fraction = t.double() / span
    by_share = span * (shift - (shift - 1.0) * fraction) ** 2 / shift  # dt/du
    return (0.5 * slope * by_share * (match.high - match.low)).float()


@torch.no_grad()
def compare(
    config: DistillConfig,
    backbone: Backbone,
    x: Tensor,
    conditioning: Conditioning,
    empty: Conditioning,
    draws: DistillDraws,
) -> TeacherAgainstFake:
    """Compare teacher and fake network at re-noised x [N R, C, h, w]. `guided` is the whole direction as DMD2 has it.

    conditioning, empty: [N R, ...] each, of the prompts and of what guidance steers away from.
    """
    process, device, w = backbone.process, backbone.device, config.match.guidance

    def predict_pair(role: str, noisy: Tensor, t: Tensor, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        """Return x0 and epsilon as `role` predicts them."""
        with backbone.role(role):
            prediction = backbone.predict(noisy, t, conditioning)
        return process.x0(noisy, prediction, t), process.epsilon(noisy, prediction, t)

    # ---- Both with the prompt, at the same noisy images ----
    t, noise = to_device(draws.times, device), to_device(draws.renoise, device)
    noisy = process.add_noise(x, noise, t)
    fake, fake_epsilon = predict_pair("fake", noisy, t, conditioning)
    teacher, teacher_epsilon = predict_pair("teacher", noisy, t, conditioning)
    errors = [(e - noise).square().flatten(1).mean(dim=1) for e in (fake_epsilon, teacher_epsilon)]
    gap = errors[0] - errors[1]

    # ---- Guidance at a level of its own (Decoupled DMD) ----
    if config.match.decoupled and w != 1.0:
        t_ca = to_device(draws.guidance_times, device)
        noisy_ca = process.add_noise(x, to_device(draws.guidance_noise, device), t_ca)
        with_prompt, _ = predict_pair("teacher", noisy_ca, t_ca, conditioning)
        without, _ = predict_pair("teacher", noisy_ca, t_ca, empty)
        _, ca = split_direction(with_prompt, without, with_prompt, w)
        # Ours: each part is measured by its own level's size, since the sizes of two levels cannot be compared. DM
        # keeps `size`, so CA is brought to it.
        size = mean_size(x, teacher)
        own = mean_size(x, guided(with_prompt, without, w))
        ca = ca * (size / own.clamp_min(1e-12)).view(-1, 1, 1, 1)
        return TeacherAgainstFake(teacher - fake, ca, teacher - fake + ca, size, gap)

    # ---- Guidance at the same level (DMD2) ----
    without = predict_pair("teacher", noisy, t, empty)[0] if w != 1.0 else teacher
    dm, ca = split_direction(teacher, without, fake, w)
    target = guided(teacher, without, w)
    return TeacherAgainstFake(dm, ca, target - fake, mean_size(x, target), gap)
