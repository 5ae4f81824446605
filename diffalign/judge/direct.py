"""Methods that sample nothing: supervised fine-tuning, Bradley-Terry, and RISD."""

from collections.abc import Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from diffalign.config import JudgeConfig
from diffalign.judge import losses, policy
from diffalign.judge.forward import Sample, read
from diffalign.judge.method import Metrics, pair_metrics, scores_of, sides
from diffalign.judge.records import RatedPair, Taught
from diffalign.rewards.judge import Judge
from diffalign.training.protocols import Parameters, Weights

Record = TypeVar("Record")


class Direct(Generic[Record]):
    """The base of methods without sampling, whose records need no preparation."""

    def __init__(self, judge: Judge, config: JudgeConfig, policy_weights: Parameters, teacher: Judge | None) -> None:
        self.judge, self.config = judge, config

    def prepare(
        self, step: int, indices: Sequence[int], records: Sequence[Record], reference: Weights | None
    ) -> list[Record]:
        """Return the records as they are."""
        return list(records)


class Supervised(Direct[RatedPair]):
    """SFT: cross-entropy of the annotated level, and of the written trace before it where the role is a teacher's."""

    def loss(self, prepared: Sequence[RatedPair], first: bool) -> tuple[Tensor, Metrics]:
        """Return losses and metrics, [n] each."""
        written = self.config.role == "teacher" and all(pair.traces for pair in prepared)
        samples = [one for pair in prepared for one in sides(pair, self._traces(pair) if written else (None, None))]
        reading = read(self.judge, samples, marker=True)
        scores = scores_of(prepared, reading.log_q)
        score_loss = losses.score_cross_entropy(reading.log_q, scores.flatten())
        trace_loss = policy.trace_cross_entropy(reading.log_p, reading.mask)
        metrics = {"score_loss": score_loss, "trace_loss": trace_loss}
        halves = {name: value.detach().view(-1, 2).mean(dim=1) for name, value in metrics.items()}
        mu = losses.expected_score(reading.log_q).view(-1, 2, 1)
        return (score_loss + trace_loss).view(-1, 2).mean(dim=1), halves | pair_metrics(mu, scores)

    def _traces(self, pair: RatedPair) -> list[tuple[int, ...]]:
        tokenizer = self.judge.tokenizer
        return [tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in pair.traces or ()]


class BradleyTerry(Direct[RatedPair]):
    """Bradley-Terry: equation 12 on scores that are given at once, which teaches their order alone."""

    def loss(self, prepared: Sequence[RatedPair], first: bool) -> tuple[Tensor, Metrics]:
        """Return losses and metrics, [n] each."""
        reading = read(self.judge, [one for pair in prepared for one in sides(pair, (None, None))])
        mu = losses.expected_score(reading.log_q).view(-1, 2, 1)
        return losses.bradley_terry(mu), pair_metrics(mu, scores_of(prepared, mu))


class Distilled(Direct[Taught]):
    """RISD: a student without reasoning learns the distributions that a teacher wrote once."""

    def loss(self, prepared: Sequence[Taught], first: bool) -> tuple[Tensor, Metrics]:
        """Return losses and metrics, [n] each."""
        reading = read(self.judge, [Sample(one.prompt, one.dimension, one.image) for one in prepared])
        teacher = torch.tensor([one.probabilities for one in prepared], device=reading.log_q.device)
        loss = losses.forward_kl(reading.log_q, teacher)
        gap = losses.expected_score(reading.log_q) - losses.expected_score(teacher.log())
        return loss, {"teacher_gap": gap.detach().abs()}
