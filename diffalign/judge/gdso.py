"""GDSO, the teacher's method, and GRPO, the paper's baseline of it (arXiv 2606.09076v2, equations 3 to 14)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.config import JudgeConfig
from diffalign.judge import losses, policy
from diffalign.judge.forward import read, right_aligned
from diffalign.judge.method import Metrics, pair_metrics, sampled_traces, scores_of, sides
from diffalign.judge.records import RatedPair
from diffalign.rewards.judge import Judge
from diffalign.training.average import averaged
from diffalign.training.protocols import Parameters, Weights


@dataclass(frozen=True)
class Rolled:
    """A pair with its traces, w's then l's, and what does not change over its updates: [2G] of each."""

    pair: RatedPair
    traces: tuple[tuple[int, ...], ...]
    advantages: Tensor
    rewards: Tensor
    old: list[Tensor]
    reference: list[Tensor] | None


class GDSO:
    """Equation 14: GRPO on rewards from score distributions, and the losses on the score position itself."""

    pairwise = True
    direct = True

    def __init__(self, judge: Judge, config: JudgeConfig, policy_weights: Parameters, teacher: Judge | None) -> None:
        self.judge, self.config, self.policy = judge, config, policy_weights

    def prepare(
        self, step: int, indices: Sequence[int], records: Sequence[RatedPair], reference: Weights | None
    ) -> list[Rolled]:
        """Sample traces of both sides of each pair, and compute their rewards and advantages."""
        chosen, weights = self.config.rollout, self.config.loss
        traces = sampled_traces(self.judge, self.config, step, indices, records)
        prepared = []
        for pair, own in zip(records, traces, strict=True):
            with torch.no_grad():
                reading = read(self.judge, sides(pair, own), chosen.temperature)
                mu = losses.expected_score(reading.log_q).view(1, 2, chosen.traces)
                rewards = losses.trace_reward(
                    mu,
                    scores_of([pair], mu),
                    weights.pointwise_reward,
                    weights.pairwise_reward if self.pairwise else 0.0,
                )
                asked = None
                if reference is not None:
                    with averaged(self.policy, reference):
                        asked = read(self.judge, sides(pair, own), chosen.temperature).rows()
            advantages = losses.group_advantages(rewards, weights.advantage_eps)
            prepared.append(Rolled(pair, own, advantages.flatten(), rewards.flatten(), reading.rows(), asked))
        return prepared

    def loss(self, prepared: Sequence[Rolled], first: bool) -> tuple[Tensor, Metrics]:
        """Return losses and metrics, [n] each."""
        chosen, weights = self.config.rollout, self.config.loss
        reading = read(self.judge, [one for w in prepared for one in sides(w.pair, w.traces)], chosen.temperature)
        log_q = reading.log_q.view(len(prepared), 2, chosen.traces, -1)
        scores = scores_of([w.pair for w in prepared], log_q)
        advantages = torch.cat([w.advantages for w in prepared])
        old = None if first else right_aligned([row for w in prepared for row in w.old])
        grpo = policy.policy_loss(reading.log_p, advantages, reading.mask, old, weights.clip, weights.length)
        total = each = grpo.view(len(prepared), -1).mean(dim=1)
        metrics: Metrics = {"policy_loss": each.detach()}
        asked = [row for w in prepared for row in w.reference or ()]
        if asked:
            kl = policy.kl_to_reference(reading.log_p, right_aligned(asked), reading.mask, weights.length)
            metrics["kl"] = kl.detach().view(len(prepared), -1).mean(dim=1)
            total = total + weights.kl * kl.view(len(prepared), -1).mean(dim=1)
        if self.direct:
            point, gap = losses.pointwise_loss(log_q, scores), losses.pairwise_loss(log_q, scores)
            metrics |= {"pointwise_loss": point.detach(), "pairwise_loss": gap.detach()}
            total = total + weights.pointwise * point + weights.pairwise * gap
        metrics["reward"] = torch.stack([w.rewards.mean() for w in prepared])
        metrics["trace_tokens"] = reading.mask.sum(dim=1).view(len(prepared), -1).mean(dim=1)
        return total, metrics | pair_metrics(losses.expected_score(log_q), scores)


class GRPO(GDSO):
    """The paper's baseline: the pointwise reward of the expected score alone, nothing on the score position."""

    pairwise = False
    direct = False
