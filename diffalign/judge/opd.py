"""On-policy distillation, the baseline of RISD (arXiv 2606.09076v2)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffalign.draws import draw
from diffalign.errors import DiffalignError
from diffalign.judge import losses, policy
from diffalign.judge.forward import read, right_aligned
from diffalign.judge.method import Metrics, Weights, pair_metrics, sampled_traces, scores_of, sides
from diffalign.judge.records import Pair
from diffalign.rewards.judge import Judge


class OnPolicy:
    """OPD: the student writes reasons and a score; each token's advantage is how much likelier the teacher finds it."""

    def __init__(self, judge: Judge, settings: Any, policy_weights: Weights, teacher: Judge | None) -> None:
        if teacher is None:
            raise DiffalignError("method opd: needs a teacher; give teacher=FOLDER")
        if teacher.tokenizer.get_vocab() != judge.tokenizer.get_vocab() or teacher.token_ids != judge.token_ids:
            raise DiffalignError(
                "method opd: teacher and student need the same tokenizer and labels, since tokens are compared"
            )
        self.judge, self.settings, self.teacher = judge, settings, teacher

    def prepare(
        self, step: int, indices: Sequence[int], records: Sequence[Pair], reference: Weights | None
    ) -> list[Any]:
        temperature = self.settings.rollout.temperature
        traces = sampled_traces(self.judge, self.settings, step, indices, records)
        work = []
        for index, pair, own in zip(indices, records, traces, strict=True):
            with torch.no_grad():
                old = read(self.judge, sides(pair, own), temperature)
                taught = read(self.teacher, sides(pair, own), temperature)
            levels = self._labels(old.log_q, step, index)
            before, wanted = (with_label(one.log_p, one.log_q, levels) for one in (old, taught))
            work.append((pair, own, levels, before, wanted))
        return work

    def loss(self, work: Sequence[Any], first: bool) -> tuple[Tensor, Metrics]:
        chosen = self.settings.rollout
        samples = [one for pair, own, *_ in work for one in sides(pair, own)]
        reading = read(self.judge, samples, chosen.temperature)
        levels = torch.cat([w[2] for w in work])
        log_p = with_label(reading.log_p, reading.log_q, levels)
        mask = torch.cat([reading.mask, reading.mask.new_ones(len(samples), 1)], dim=1)
        old, taught = (right_aligned([row for w in work for row in w[place]]) for place in (3, 4))
        loss = policy.on_policy_distillation(log_p, old, taught, mask).view(len(work), -1).mean(dim=1)
        pairs = [w[0] for w in work]
        mu = losses.expected_score(reading.log_q).view(len(work), 2, -1)
        apart = policy.over_tokens(old - taught, mask, "mean").view(len(work), -1).mean(dim=1)
        tokens = mask.sum(dim=1).view(len(work), -1).mean(dim=1)
        return loss, {"reverse_kl": apart, "trace_tokens": tokens} | pair_metrics(mu, scores_of(pairs, mu))

    def _labels(self, log_q: Tensor, step: int, index: int) -> Tensor:
        """The score that ends each sample, drawn by its own key: [N] levels."""
        probabilities = log_q.exp().double().cpu().numpy()
        drawn = [
            int(draw(self.settings.seed, "judge-label", step=step, group=index, member=i).choice(len(q), p=q / q.sum()))
            for i, q in enumerate(probabilities)
        ]
        return torch.tensor(drawn, device=log_q.device)


def with_label(log_p: Tensor, log_q: Tensor, levels: Tensor) -> Tensor:
    """Tokens of the trace, then the label's place among the nine: [N, T + 1]."""
    return torch.cat([log_p, log_q.gather(-1, levels[:, None])], dim=1)
