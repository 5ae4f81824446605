"""Z-Reward's objectives on score distributions (arXiv 2606.09076v2). Pure functions; the equations are the paper's.

A pair has two sides, w (better) and l (worse), each with G reasoning traces. What a model says at the score position is a
distribution over nine levels 1.0, 1.5, ..., 5.0, given as log-probabilities over these nine alone. Shapes:

    log_q   [B, 2, G, 9]   sides in the order w, l
    mu      [B, 2, G]      expected scores
    scores  [B, 2]         annotated scores, on the nine levels where a level is needed

Everything keeps a float64 input and is float32 otherwise: in bfloat16 the nine probabilities sum to 0.9998.
"""

import torch
from torch import Tensor

LEVELS = 9
LOWEST, HIGHEST = 1.0, 5.0
RANGE = HIGHEST - LOWEST


def wide(x: Tensor) -> Tensor:
    """Return `x` in float32 at least."""
    return x if x.dtype == torch.float64 else x.float()


def levels(like: Tensor) -> Tensor:
    """Return the nine scores, [9], on the device of `like`, wide."""
    return torch.linspace(LOWEST, HIGHEST, LEVELS, device=like.device, dtype=wide(like).dtype)


def level_of(scores: Tensor) -> Tensor:
    """Return the indices 0..8 of scores that lie on the levels. ValueError for one between two levels: it has no bin."""
    place = (scores.double() - LOWEST) * 2
    index = place.round()
    if bool(((place - index).abs() > 1e-4).any()) or bool((index < 0).any()) or bool((index >= LEVELS).any()):
        raise ValueError(f"scores must be on the levels 1.0, 1.5, ..., 5.0, not {scores.tolist()}")
    return index.long()


def expected_score(log_q: Tensor) -> Tensor:
    """Return mu = sum_s s q(s): [..., 9] -> [...]."""
    return (wide(log_q).exp() * levels(log_q)).sum(dim=-1)


def pointwise_reward(mu: Tensor, scores: Tensor) -> Tensor:
    """Return equation 7: 1 - |mu - score| / R, in [0, 1]. -> [B, 2, G]"""
    return 1 - (mu - scores[..., None]).abs() / RANGE


def gap_error(mu: Tensor, scores: Tensor) -> Tensor:
    """Return |(mu_w,i - mu_l,k) - (score_w - score_l)|: traces of w in rows, of l in columns. -> [B, G, G]"""
    gap = mu[:, 0, :, None] - mu[:, 1, None, :]
    return (gap - (scores[:, 0] - scores[:, 1])[:, None, None]).abs()


def pairwise_reward(mu: Tensor, scores: Tensor) -> Tensor:
    """Return equation 10: 1 - the mean gap error of a trace against all of the other side, over R; in [-1, 1]. -> [B, 2, G]

    From l's side gap and difference both change their sign, so the error is the same matrix, read by columns.
    """
    error = gap_error(mu, scores)
    return 1 - torch.stack([error.mean(dim=2), error.mean(dim=1)], dim=1) / RANGE


def trace_reward(mu: Tensor, scores: Tensor, pointwise: float, pairwise: float) -> Tensor:
    """Return equation 13, a constant: rewards reach the model through advantages only. -> [B, 2, G]"""
    mu = mu.detach()
    return pointwise * pointwise_reward(mu, scores) + pairwise * pairwise_reward(mu, scores)


def group_advantages(rewards: Tensor, eps: float = 1e-6) -> Tensor:
    """Return equation 3 over the last dimension, the traces of one side: never over both sides together.

    The paper does not say which deviation; it is the population's here. Equal rewards give exactly 0.
    """
    centred = rewards - rewards.mean(dim=-1, keepdim=True)
    spread = rewards.std(dim=-1, keepdim=True, correction=0)
    equal = rewards.amax(dim=-1, keepdim=True) == rewards.amin(dim=-1, keepdim=True)
    return torch.where(equal, torch.zeros_like(centred), centred / (spread + eps))


def pointwise_loss(log_q: Tensor, scores: Tensor) -> Tensor:
    """Return equation 8: cross-entropy at the annotated level, mean over sides and traces. -> [B]"""
    index = level_of(scores)[:, :, None, None].expand(*log_q.shape[:3], 1)
    return -wide(log_q).gather(-1, index).mean(dim=(1, 2, 3))


def pairwise_loss(log_q: Tensor, scores: Tensor) -> Tensor:
    """Return equation 11: the mean gap error over R, with a gradient into both sides. -> [B]"""
    return gap_error(expected_score(log_q), scores).mean(dim=(1, 2)) / RANGE


def bradley_terry(mu: Tensor) -> Tensor:
    """Return equation 12, for contrast: -log sigmoid(mu_w - mu_l) of the sides' mean scores. -> [B]

    It widens margins for ever.
    """
    mean = wide(mu).mean(dim=-1)
    return -torch.nn.functional.logsigmoid(mean[:, 0] - mean[:, 1])


def score_cross_entropy(log_q: Tensor, scores: Tensor) -> Tensor:
    """Return -log q(score): [N, 9], [N] -> [N]."""
    return -wide(log_q).gather(-1, level_of(scores)[:, None])[:, 0]


def forward_kl(log_q: Tensor, teacher: Tensor) -> Tensor:
    """Return RISD's loss, equation 15: KL(teacher || student) over the nine levels; the gradient on logits is q - teacher.

    `log_q` [N, 9] of the student; `teacher` [N, 9] probabilities. -> [N]
    """
    teacher = wide(teacher)
    return (torch.special.xlogy(teacher, teacher) - teacher * wide(log_q)).sum(dim=-1)
