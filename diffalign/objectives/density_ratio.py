"""Estimate R_dm = log p_teacher(x) / p_student(x) from denoising losses, without any density.

    R_dm(x) = 1/2 INT dlambda E[ |e_F - e|^2 - |e_R - e|^2 ],   lambda the log signal-to-noise ratio

with e_F, e_R the epsilon predictions of fake and teacher at the same noisy x, norms summed over elements. This follows from
the denoising form of the likelihood (Kingma et al. 2021, arXiv:2107.00630) and holds for the teacher *without* guidance: a
guided prediction is the score of no density. For a rectified flow the integral over s in (0, 1) has the weights below.
"""

from typing import Literal

import torch
from torch import Tensor


def flow_weight(s: Tensor, on: Literal["epsilon", "velocity", "x0"] = "velocity") -> Tensor:
    """Return |dlambda/ds| / 2 for x_s = (1 - s) x + s e, for squared errors of epsilon, of the velocity, or of x0."""
    if on == "epsilon":
        return 1.0 / (s * (1.0 - s))
    return (1.0 - s) / s if on == "velocity" else (1.0 - s) / s**3


def ratio_terms(fake: Tensor, teacher: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Return one draw's estimate for each image, [N]: w (|f - target|^2 - |r - target|^2), summed over elements.

    weight [N]: |dlambda/dt| / 2 over the density that t was drawn with. Both predictions must be of the same noisy x.
    """
    gap = (fake - target).square() - (teacher - target).square()
    return weight * gap.flatten(1).sum(dim=1)


def with_error(terms: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean over draws and its standard error, each [N], from terms [draws, N]; the error of one draw is NaN."""
    return terms.mean(dim=0), terms.std(dim=0) / len(terms) ** 0.5 if len(terms) > 1 else terms[0] * torch.nan
