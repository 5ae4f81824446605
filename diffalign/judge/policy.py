"""Losses on sampled tokens: GRPO (equation 4 of arXiv 2606.09076v2), supervised traces, and on-policy distillation.

N samples of up to T tokens. `log_p` [N, T]: log-probability of each sampled token; `mask` [N, T]: 1 for tokens that were
sampled, 0 for padding and for what the code appends itself (the answer marker).
"""

from typing import Literal

import torch
from torch import Tensor

from diffalign.judge.losses import wide

Length = Literal["sum", "mean"]


def over_tokens(values: Tensor, mask: Tensor, length: Length) -> Tensor:
    """Sum a sample's tokens, as printed in equation 4, or average them, which does not grow with the trace. -> [N]"""
    total = (values * mask).sum(dim=-1)
    return total if length == "sum" else total / mask.sum(dim=-1).clamp(min=1)


def policy_loss(
    log_p: Tensor,
    advantages: Tensor,
    mask: Tensor,
    old: Tensor | None = None,
    clip: float = 0.2,
    length: Length = "mean",
) -> Tensor:
    """Return -A sum_t log pi on the first update of a batch, PPO's clipped ratio to the sampling policy on later ones. -> [N]

    `advantages` [N]. `old` [N, T]: the tokens' log-probabilities when they were sampled; None says that the policy has not
    changed since, where both forms have the same gradient. The paper prints the first form, while its Algorithm 1 makes
    several inner updates with samples of one old policy, which needs the ratio; the clip is ours.
    """
    log_p, advantages = wide(log_p), wide(advantages)[:, None]
    if old is None:
        return -over_tokens(advantages * log_p, mask, length)
    ratio = (log_p - wide(old)).exp()
    least = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return -over_tokens(least, mask, length)


def kl_to_reference(log_p: Tensor, reference: Tensor, mask: Tensor, length: Length = "mean") -> Tensor:
    """Estimate KL(pi || pi_ref) from samples of pi: exp(d) - d - 1 with d = log pi_ref - log pi; never negative. -> [N]"""
    difference = wide(reference) - wide(log_p)
    return over_tokens(difference.exp() - difference - 1, mask, length)


def trace_cross_entropy(log_p: Tensor, mask: Tensor) -> Tensor:
    """Return -log p per token of a written trace; 0 where there is none. -> [N]"""
    return -over_tokens(wide(log_p), mask, "mean")


def on_policy_distillation(log_p: Tensor, old: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Return OPD's loss: -(1/T) sum_t sg(A_t) log pi with A_t = log pi_teacher - log pi_old, the reverse KL per token. -> [N]

    The student's own samples; the last token is the score.
    """
    advantages = (wide(teacher) - wide(old)).detach()
    return -over_tokens(advantages * wide(log_p), mask, "mean")
