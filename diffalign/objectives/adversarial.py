"""The adversarial losses of few-step distillation on logits that say "real" (DMD2, arXiv:2405.14867, section 4.4).

The non-saturating form of Goodfellow et al. 2014. Logits [N] of images that the student drew, and of real ones, both at a
noisy level (a discriminator of noisy images: Wang et al. 2022, Diffusion-GAN). Losses [N], float32.
"""

import torch.nn.functional as F
from torch import Tensor


def generator_loss(drawn: Tensor) -> Tensor:
    """Return softplus(-D(drawn)) = -log sigmoid(D), [N]: low where the critic takes the student's images for real."""
    return F.softplus(-drawn)


def critic_loss(drawn: Tensor, real: Tensor) -> Tensor:
    """Return softplus(D(drawn)) + softplus(-D(real)), [N]; 2 log 2 for a critic that cannot tell them apart."""
    return F.softplus(drawn) + F.softplus(-real)
