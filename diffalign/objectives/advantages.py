"""Turn rewards into advantages for a few-step student (GNDMR), and into the factors of its loss.

GNDMR's text was not available (see `distribution_matching.py`); it is certain only that it joins distribution matching
with external rewards by weights. The code follows two open methods: advantages standardised per prompt and
reward, summed, standardised again and clipped at 5 (RTDMD, arXiv:2605.26108), which multiply the guidance term CA alone
(the authors of DMDR, arXiv:2511.13649, name DM + A CA). An advantage never multiplies DM: where it is negative, that would
push the student away from the teacher.

Rewards [B, G]: B prompts, G images each; NaN is an image that could not be scored, which gets A = 0.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

Baseline = Literal["mean", "leave_one_out"]
Spread = Literal["group", "batch", "none"]
Use = Literal["factor", "raw", "exponential"]
EPSILON = 1e-4
CLIP = 5.0


def standardised(
    rewards: Tensor,
    baseline: Baseline = "mean",
    spread: Spread = "group",
    sample_std: bool = False,
    epsilon: float = EPSILON,
) -> Tensor:
    """Return (r - baseline) / (std + epsilon), [B, G]; exactly 0 in a group whose known rewards are all equal.

    baseline leave_one_out: the mean of the *other* images, which does not shrink the gradient by 1 - 1/G.
    spread batch: one std over all images of all prompts (RTDMD). sample_std: the std divides by n - 1.
    """
    known = torch.isfinite(rewards)
    values = torch.where(known, rewards, torch.zeros_like(rewards))
    count = known.sum(dim=1, keepdim=True)
    mean = values.sum(dim=1, keepdim=True) / count.clamp_min(1)
    centred = torch.where(known, values - mean, torch.zeros_like(values))
    advantage = centred
    if baseline == "leave_one_out":
        # r_i - mean of the others = (r_i - mean) n / (n - 1).
        advantage = centred * count / (count - 1).clamp_min(1)
    if spread != "none":
        if spread == "group":
            squares, n = centred.square().sum(dim=1, keepdim=True), count
        else:
            everything = values[known]
            squares, n = (everything - everything.mean()).square().sum().view(1, 1), known.sum().view(1, 1)
        advantage = advantage / ((squares / (n - int(sample_std)).clamp_min(1)).sqrt() + epsilon)
    low = torch.where(known, rewards, torch.full_like(rewards, torch.inf)).amin(dim=1, keepdim=True)
    high = torch.where(known, rewards, torch.full_like(rewards, -torch.inf)).amax(dim=1, keepdim=True)
    return torch.where(high > low, advantage, torch.zeros_like(advantage))


def combined(
    rewards: Mapping[str, Tensor],
    weights: Mapping[str, float],
    baseline: Baseline = "mean",
    spread: Spread = "group",
    clip: float = CLIP,
) -> Tensor:
    """Return A [B, G]: rewards standardised one by one, summed by weight, standardised again if several, and clipped.

    Summing first would leave a reward with a small range without influence.
    """
    total = torch.stack([weights[n] * standardised(values, baseline, spread) for n, values in rewards.items()]).sum(
        dim=0
    )
    return (standardised(total, baseline, spread) if len(rewards) > 1 else total).clamp(-clip, clip)


def ca_factor(advantage: Tensor, use: Use = "factor", strength: float = 0.5) -> Tensor:
    """Return the factor of the guidance term, in the shape of `advantage`.

    use factor: max(0, 1 + strength A), so that without rewards the distillation is unchanged, and guidance never changes
    its sign. raw: A itself (DMDR's authors; only for a student that already works, since A = 0 removes all guidance).
    exponential: 1 here, see `exponential_weights`.
    """
    if use == "factor":
        return (1.0 + strength * advantage).clamp_min(0.0)
    return advantage if use == "raw" else torch.ones_like(advantage)


def exponential_weights(rewards: Tensor) -> Tensor:
    """Return exp(r / |r|), [B, G], the factor of the *whole* direction (DMDR's RT-DM, eq. 4); an unknown reward counts 0.

    The paper does not define the norm. Here it is taken over the G images of a prompt, so that a batch may be split freely;
    with a single image every positive reward would give e. For rewards with a small relative spread the weights hardly
    differ, and a positive weight does not move the optimum of DM.
    """
    known = torch.isfinite(rewards)
    values = torch.where(known, rewards, torch.zeros_like(rewards))
    return (values / values.norm(dim=1, keepdim=True).clamp_min(1e-12)).exp()


def inverse_spread(stds: Mapping[str, float]) -> dict[str, float]:
    """Return weights in proportion to 1 / std that sum to 1, for rewards that are summed on their own scales."""
    inverse = {name: 1.0 / max(std, 1e-12) for name, std in stds.items()}
    return {name: value / sum(inverse.values()) for name, value in inverse.items()}


def by_spread(rewards: Mapping[str, Tensor], weights: Mapping[str, float]) -> dict[str, Tensor]:
    """Return DVAO's weights, [B, 1] each: w_k sigma_k / sum w_l sigma_l with sigma the std within the prompt.

    With them the sum of standardised advantages is the centred *weighted sum of rewards* over sum w_l sigma_l: a reward
    that is equal for all images of a prompt has weight 0 there. Sigma depends on the reward's scale. If all are 0, the
    weights are 0.
    """
    spreads = {n: weights[n] * r.std(dim=1, correction=0, keepdim=True) for n, r in rewards.items()}
    total = torch.stack(list(spreads.values())).sum(dim=0)
    return {name: torch.where(total > 0, s / total.clamp_min(1e-12), s) for name, s in spreads.items()}


def gradient_balance(of: Tensor, other: Tensor) -> Tensor:
    """Return |g| / (|g'| + 1e-8) of each image, [N], which scales the second gradient to the first (VQGAN's balance)."""
    return of.flatten(1).norm(dim=1) / (other.flatten(1).norm(dim=1) + 1e-8)
