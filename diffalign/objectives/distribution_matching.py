"""Pure functions of distribution matching distillation: DMD2, Decoupled DMD, and GNDM's group statistics.

DMD2 (Yin et al. 2024, arXiv:2405.14867; its eqs. are those of DMD, arXiv:2311.18828, eqs. 7 and 8) moves a student's image
x along the difference of two x0-predictions at a re-noised x: the frozen teacher's under guidance, minus that of a "fake"
network that is trained on the student's own images. The difference is divided by mean|x - teacher's prediction|.

**Which GNDM this is.** Of R_dm / GNDM / GNDMR (Fan et al. 2026, arXiv:2603.28460) only the abstract could be read, and no
code is public. It says that distribution matching is seen as a reward whose estimate is stabilised by "group-mean
statistics". What is implemented is a *reading* of that: the images of one prompt share a noise level, and their size
mean|x - mu| is averaged over the group (`scale="group_mean"`), so that the group's direction stays proportional to the
gradient of the divergence. Other readings are options: re-noisings of one image as the group (`axis="renoise"`), no scale
at all, a scalar advantage (`density_ratio.py`). The group's mean *direction* is never subtracted: that would stop the mean
image of a prompt from moving at all (`tests/objectives/test_distribution_matching.py` shows it on a toy).

Shapes: x and predictions [N, ...], N = groups x members, a group's members side by side. mu are x0-predictions; all
directions point *up* the teacher's likelihood (DMD2's `grad` is their negative).
"""

from typing import Literal

import torch
from torch import Tensor

Axis = Literal["none", "prompt", "renoise"]
Scale = Literal["per_sample", "group_mean", "none"]


def _wide(values: Tensor, like: Tensor) -> Tensor:
    """Reshape [N] to [N, 1, ...]."""
    return values.reshape(-1, *([1] * (like.dim() - 1)))


def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Return u + w (c - u), classifier-free guidance as Ho & Salimans (2022) and DMD2 write it; w = 1 is no guidance.

    Other code writes c + w (c - u), whose w is smaller by 1.
    """
    return unconditional + scale * (conditional - unconditional)


def split_direction(conditional: Tensor, unconditional: Tensor, fake: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return DM = c - f and CA = (w - 1)(c - u); their sum is `guided(c, u, w) - f` (Decoupled DMD, arXiv:2511.22677).

    DM matches the distributions and is 0 where they agree. CA, the guidance's augmentation, makes few steps work.
    """
    return conditional - fake, (scale - 1.0) * (conditional - unconditional)


def mean_size(x: Tensor, prediction: Tensor) -> Tensor:
    """Return mean|x - mu| over all but the batch, [N]: DMD's normaliser, for the *guided* prediction and the clean x."""
    return (x - prediction).abs().flatten(1).mean(dim=1)


def normalised(
    direction: Tensor, size: Tensor, group: int = 1, axis: Axis = "none", scale: Scale = "per_sample"
) -> Tensor:
    """Return the direction [N, ...] over its size [N], by group; 0 where both are 0.

    axis none: DMD2, each image alone. prompt: `group` images of a prompt. renoise: `group` re-noisings of one image,
    whose directions are averaged into [N / group, ...]. scale group_mean: the size is the group's mean; per_sample: each
    image's; none: not scaled. A group of 1 is DMD2 bit for bit. Raises ValueError if N is no multiple of `group`.
    """
    if len(direction) % group or (axis == "none" and group != 1):
        raise ValueError(f"{len(direction)} images are not whole groups of {group} on axis {axis}")
    sizes = size.view(-1, group)
    if scale == "group_mean":
        sizes = sizes.mean(dim=1, keepdim=True).expand_as(sizes)
    elif scale == "none":
        sizes = torch.ones_like(sizes)
    if axis == "renoise" and scale != "per_sample":
        together = direction.unflatten(0, (-1, group)).mean(dim=1)
        return (together / _wide(sizes[:, 0], together)).nan_to_num(0.0, 0.0, 0.0)
    each = (direction / _wide(sizes.flatten(), direction)).nan_to_num(0.0, 0.0, 0.0)
    return each.unflatten(0, (-1, group)).mean(dim=1) if axis == "renoise" else each


def matching_loss(x: Tensor, step: Tensor) -> Tensor:
    """Return 0.5 mean (x - sg[x + g])^2, [N], whose gradient to x is -g / elements (DMD eq. 7 as in DMD2's code)."""
    return 0.5 * (x - (x + step).detach()).square().flatten(1).mean(dim=1)
