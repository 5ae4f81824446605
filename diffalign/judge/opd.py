"""On-policy distillation, the baseline of RISD (arXiv 2606.09076v2)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.config import JudgeConfig
from diffalign.draws import draw
from diffalign.errors import DiffalignError
from diffalign.judge import losses, policy
from diffalign.judge.forward import read, right_aligned
from diffalign.judge.method import Metrics, pair_metrics, sampled_traces, scores_of, sides
from diffalign.judge.records import RatedPair
from diffalign.rewards.judge import Judge
from diffalign.training.protocols import Parameters, Weights


@dataclass(frozen=True)
class Answered:
    """A pair with the student's traces and drawn levels [2G], and each token's log-probability by student and teacher."""

    pair: RatedPair
    traces: tuple[tuple[int, ...], ...]
    levels: Tensor
    student: Tensor
    teacher: Tensor


class OnPolicy:
    """OPD: the student writes reasons and a score; each token's advantage is how much likelier the teacher finds it."""

    def __init__(self, judge: Judge, config: JudgeConfig, policy_weights: Parameters, teacher: Judge | None) -> None:
        """Raise DiffalignError without a teacher, or with one of another tokenizer."""
        if teacher is None:
            raise DiffalignError("method opd: needs a teacher; give teacher=FOLDER")
        if teacher.tokenizer.get_vocab() != judge.tokenizer.get_vocab() or teacher.token_ids != judge.token_ids:
            raise DiffalignError(
                "method opd: teacher and student need the same tokenizer and labels, since tokens are compared"
            )
        self.judge, self.config, self.teacher = judge, config, teacher

    def prepare(
        self, step: int, indices: Sequence[int], records: Sequence[RatedPair], reference: Weights | None
    ) -> list[Answered]:
        """Sample the student's traces and scores, and ask the teacher how likely each token is."""
        temperature = self.config.rollout.temperature
        traces = sampled_traces(self.judge, self.config, step, indices, records)
        prepared = []
        for index, pair, own in zip(indices, records, traces, strict=True):
            with torch.no_grad():
                old = read(self.judge, sides(pair, own), temperature)
                taught = read(self.teacher, sides(pair, own), temperature)
            levels = self._labels(old.log_q, step, index)
            student, teacher = (with_label(one.log_p, one.log_q, levels) for one in (old, taught))
            prepared.append(Answered(pair, own, levels, student, teacher))
        return prepared

    def loss(self, prepared: Sequence[Answered], first: bool) -> tuple[Tensor, Metrics]:
        """Return losses and metrics, [n] each."""
        n, samples = len(prepared), [one for p in prepared for one in sides(p.pair, p.traces)]
        reading = read(self.judge, samples, self.config.rollout.temperature)
        log_p = with_label(reading.log_p, reading.log_q, torch.cat([p.levels for p in prepared]))
        mask = torch.cat([reading.mask, reading.mask.new_ones(len(samples), 1)], dim=1)
        old = right_aligned([row for p in prepared for row in p.student])
        taught = right_aligned([row for p in prepared for row in p.teacher])
        loss = policy.on_policy_distillation(log_p, old, taught, mask).view(n, -1).mean(dim=1)
        mu = losses.expected_score(reading.log_q).view(n, 2, -1)
        apart = policy.over_tokens(old - taught, mask, "mean").view(n, -1).mean(dim=1)
        tokens = mask.sum(dim=1).view(n, -1).mean(dim=1)
        scores = scores_of([p.pair for p in prepared], mu)
        return loss, {"reverse_kl": apart, "trace_tokens": tokens} | pair_metrics(mu, scores)

    def _labels(self, log_q: Tensor, step: int, index: int) -> Tensor:
        """Draw the score that ends each sample, drawn by its own key: [N] levels."""
        probabilities = log_q.exp().double().cpu().numpy()
        drawn = [
            int(draw(self.config.seed, "judge-label", step=step, group=index, member=i).choice(len(q), p=q / q.sum()))
            for i, q in enumerate(probabilities)
        ]
        return torch.tensor(drawn, device=log_q.device)


def with_label(log_p: Tensor, log_q: Tensor, levels: Tensor) -> Tensor:
    """Append the label's log-probability among the nine to the trace's tokens: [N, T + 1]."""
    return torch.cat([log_p, log_q.gather(-1, levels[:, None])], dim=1)
