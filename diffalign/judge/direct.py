"""Methods that sample nothing: supervised fine-tuning, Bradley-Terry, and RISD."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffalign.judge import losses, policy
from diffalign.judge.forward import Sample, read
from diffalign.judge.method import Metrics, Weights, pair_metrics, scores_of, sides
from diffalign.judge.records import Pair, Taught
from diffalign.rewards.judge import Judge


class Direct:
    """What methods without sampling share: the records are the work."""

    def __init__(self, judge: Judge, settings: Any, policy_weights: Weights, teacher: Judge | None) -> None:
        self.judge, self.settings = judge, settings

    def prepare(
        self, step: int, indices: Sequence[int], records: Sequence[Any], reference: Weights | None
    ) -> list[Any]:
        return list(records)


class Supervised(Direct):
    """SFT: cross-entropy of the annotated level, and of the written trace before it where the role is a teacher's."""

    def loss(self, work: Sequence[Pair], first: bool) -> tuple[Tensor, Metrics]:
        written = self.settings.role == "teacher" and all(pair.traces for pair in work)
        samples = [one for pair in work for one in sides(pair, self._traces(pair) if written else (None, None))]
        reading = read(self.judge, samples, marker=True)
        scores = scores_of(work, reading.log_q)
        score_loss = losses.score_cross_entropy(reading.log_q, scores.flatten())
        trace_loss = policy.trace_cross_entropy(reading.log_p, reading.mask)
        metrics = {"score_loss": score_loss, "trace_loss": trace_loss}
        halves = {name: value.detach().view(-1, 2).mean(dim=1) for name, value in metrics.items()}
        mu = losses.expected_score(reading.log_q).view(-1, 2, 1)
        return (score_loss + trace_loss).view(-1, 2).mean(dim=1), halves | pair_metrics(mu, scores)

    def _traces(self, pair: Pair) -> list[tuple[int, ...]]:
        tokenizer = self.judge.tokenizer
        return [tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in pair.traces or ()]


class BradleyTerry(Direct):
    """Equation 12 on the scores that are given at once: an order, without the scores themselves."""

    def loss(self, work: Sequence[Pair], first: bool) -> tuple[Tensor, Metrics]:
        reading = read(self.judge, [one for pair in work for one in sides(pair, (None, None))])
        mu = losses.expected_score(reading.log_q).view(-1, 2, 1)
        return losses.bradley_terry(mu), pair_metrics(mu, scores_of(work, mu))


class Distilled(Direct):
    """RISD: the student, without any reasoning, against the distributions that a teacher wrote once."""

    def loss(self, work: Sequence[Taught], first: bool) -> tuple[Tensor, Metrics]:
        reading = read(self.judge, [Sample(one.prompt, one.dimension, one.image) for one in work])
        teacher = torch.tensor([one.probabilities for one in work], device=reading.log_q.device)
        loss = losses.forward_kl(reading.log_q, teacher)
        gap = losses.expected_score(reading.log_q) - losses.expected_score(teacher.log())
        return loss, {"teacher_gap": gap.detach().abs()}
