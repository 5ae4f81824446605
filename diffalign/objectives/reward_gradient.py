"""Losses for fine-tuning on the gradient of a reward, as pure functions of scores and predictions.

    linear   -r                       DRaFT (Clark et al. 2023, arXiv:2309.17400), AlignProp (arXiv:2310.03739)
    relu     max(0, threshold - r)    ReFL's phi (Xu et al. 2023, arXiv:2304.05977); its code has threshold 2 for ImageReward

Above its threshold `relu` is 0, so images that are good enough have no gradient. Several rewards are summed with their
weights; these set the scale too, since raw scores differ by orders of magnitude (HPSv2 near 0.28, PickScore near 21).

Such a loss does not see how far the model moves: a reward that can be fooled will be. ReFL adds the pre-training loss on
real images; here it is the drift from the reference, which needs no images.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Form = Literal["linear", "relu"]


@dataclass(frozen=True)
class RewardTerm:
    """The form and weight of one reward in the loss. Raises ValueError unless relu and a threshold come together."""

    weight: float = 1.0
    form: Form = "linear"
    threshold: float | None = None

    def __post_init__(self) -> None:
        if (self.form == "relu") != (self.threshold is not None):
            raise ValueError("a threshold belongs to form 'relu', which needs one")

    def loss(self, scores: Tensor) -> Tensor:
        """Return weight * -r, or weight * max(0, threshold - r), [N], from scores [N]."""
        if self.threshold is None:
            return -self.weight * scores
        return self.weight * (self.threshold - scores).clamp_min(0.0)


def reward_loss(scores: dict[str, Tensor], terms: dict[str, RewardTerm]) -> Tensor:
    """Return the sum of the terms' losses, [N], from scores [N] by name."""
    return torch.stack([term.loss(scores[name]) for name, term in terms.items()]).sum(dim=0)


def mean_score(scores: dict[str, Tensor], terms: dict[str, RewardTerm]) -> Tensor:
    """Return the weighted mean of the scores, [N], for curves; with a single reward, the score itself."""
    total = sum(term.weight for term in terms.values())
    return torch.stack([term.weight / total * scores[name] for name, term in terms.items()]).sum(dim=0)


def drift(policy: Tensor, reference: Tensor) -> Tensor:
    """Return the mean squared difference of two predictions [N, C, h, w] at the same noisy latent, [N].

    Summed over a path it is, up to a factor per step, the KL divergence of the two samplers with noise of that size in
    each step (DPOK, arXiv:2305.16381, shows it for DDPM).
    """
    return (policy.float() - reference.float()).square().flatten(1).mean(dim=1)
