"""Losses for fine-tuning on the gradient of a reward, as pure functions of scores and predictions.

    linear   -r                       DRaFT (Clark et al. 2023, arXiv:2309.17400), AlignProp (arXiv:2310.03739)
    relu     max(0, threshold - r)    ReFL's phi (Xu et al. 2023, arXiv:2304.05977); its code has threshold 2 for ImageReward

Above its threshold `relu` says nothing, so images that are good enough stop pulling. Several rewards are summed with their
weights; these carry the scale too, since raw scores lie orders of magnitude apart (HPSv2 near 0.28, PickScore near 21).

Such a loss knows nothing of what the model was: a reward that can be fooled will be. ReFL holds against it with the
pre-training loss on real images; here it is the drift from the reference, which needs no images.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Form = Literal["linear", "relu"]


@dataclass(frozen=True)
class RewardTerm:
    """How one reward enters the loss. Raises ValueError for a relu without a threshold, or a threshold without a relu."""

    weight: float = 1.0
    form: Form = "linear"
    threshold: float | None = None

    def __post_init__(self) -> None:
        if (self.form == "relu") != (self.threshold is not None):
            raise ValueError("a threshold belongs to form 'relu', which needs one")

    def loss(self, scores: Tensor) -> Tensor:
        """weight * -r, or weight * max(0, threshold - r): [N], from scores [N]."""
        if self.threshold is None:
            return -self.weight * scores
        return self.weight * (self.threshold - scores).clamp_min(0.0)


def reward_loss(scores: dict[str, Tensor], terms: dict[str, RewardTerm]) -> Tensor:
    """Sum of the terms' losses, [N], from scores [N] by name."""
    return torch.stack([term.loss(scores[name]) for name, term in terms.items()]).sum(dim=0)


def mean_score(scores: dict[str, Tensor], terms: dict[str, RewardTerm]) -> Tensor:
    """Mean of the scores by weight, [N]: for curves; of a single reward, the score itself."""
    total = sum(term.weight for term in terms.values())
    return torch.stack([term.weight / total * scores[name] for name, term in terms.items()]).sum(dim=0)


def drift(policy: Tensor, reference: Tensor) -> Tensor:
    """Mean squared difference of two predictions [N, C, h, w] at the same noisy latent, [N].

    Summed over a path it is, but for a factor of each step, the KL divergence of the two samplers with noise of that size in
    each step (DPOK, arXiv:2305.16381, has it for DDPM).
    """
    return (policy.float() - reference.float()).square().flatten(1).mean(dim=1)
