"""The methods of Z-Reward and those that it is compared with: each turns records into losses.

A step first prepares its records without a gradient (sampling traces, asking the reference or a teacher), then asks for the
losses of a few of them at a time. `settings` is a JudgeConfig.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from diffalign.draws import draw
from diffalign.errors import DiffalignError
from diffalign.judge import losses, policy
from diffalign.judge.forward import Sample, read, right_aligned
from diffalign.judge.records import Pair, Taught
from diffalign.judge.rollout import sample_traces
from diffalign.rewards.readout import Judge
from diffalign.training.validation import averaged

Metrics = dict[str, Tensor]
Weights = dict[str, Any]
"""A policy's trainable parameters by name."""


class Method(Protocol):
    """`prepare` returns one piece of work a record; `loss` takes some of them and gives [n] losses and [n] metrics."""

    def prepare(
        self, step: int, indices: Sequence[int], records: Sequence[Any], reference: Weights | None
    ) -> list[Any]: ...

    def loss(self, work: Sequence[Any], first: bool) -> tuple[Tensor, Metrics]: ...


def sides(pair: Pair, traces: Sequence[tuple[int, ...] | None]) -> list[Sample]:
    """Samples of a pair: all traces of the better image, then all of the worse; `traces` in that order."""
    each = len(traces) // 2
    return [Sample(pair.prompt, pair.dimension, pair.images[i // each], trace) for i, trace in enumerate(traces)]


def pair_metrics(mu: Tensor, scores: Tensor) -> Metrics:
    """Of mean expected scores [B, 2, G]: the error of a side's mean, and whether the better image got more."""
    mean = mu.detach().mean(dim=-1)
    return {"score_error": (mean - scores).abs().mean(dim=1), "accuracy": (mean[:, 0] > mean[:, 1]).to(mu.dtype)}


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


@dataclass(frozen=True)
class Rolled:
    """A pair with its traces, w's then l's, and what does not change while it is learnt from: [2G] of each."""

    pair: Pair
    traces: tuple[tuple[int, ...], ...]
    advantages: Tensor
    rewards: Tensor
    old: list[Tensor]
    reference: list[Tensor] | None


class GDSO:
    """Equation 14: GRPO on rewards from score distributions, and the losses on the score position itself."""

    pairwise = True
    direct = True

    def __init__(self, judge: Judge, settings: Any, policy_weights: Weights, teacher: Judge | None) -> None:
        self.judge, self.settings, self.policy = judge, settings, policy_weights

    def prepare(
        self, step: int, indices: Sequence[int], records: Sequence[Pair], reference: Weights | None
    ) -> list[Rolled]:
        chosen, weights = self.settings.rollout, self.settings.loss
        samples = [one for pair in records for one in sides(pair, [None] * (2 * chosen.traces))]
        traces = sample_traces(
            self.judge,
            samples,
            keyed(self.settings.seed, step, indices, 2 * chosen.traces),
            max_tokens=chosen.max_tokens,
            temperature=chosen.temperature,
            batch_size=chosen.batch_size,
        )
        work = []
        for number, pair in enumerate(records):
            own = tuple(traces[number * 2 * chosen.traces : (number + 1) * 2 * chosen.traces])
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
            work.append(Rolled(pair, own, advantages.flatten(), rewards.flatten(), reading.rows(), asked))
        return work

    def loss(self, work: Sequence[Rolled], first: bool) -> tuple[Tensor, Metrics]:
        chosen, weights = self.settings.rollout, self.settings.loss
        reading = read(self.judge, [one for w in work for one in sides(w.pair, w.traces)], chosen.temperature)
        log_q = reading.log_q.view(len(work), 2, chosen.traces, -1)
        scores = scores_of([w.pair for w in work], log_q)
        advantages = torch.cat([w.advantages for w in work])
        old = None if first else right_aligned([row for w in work for row in w.old])
        grpo = policy.policy_loss(reading.log_p, advantages, reading.mask, old, weights.clip, weights.length)
        total = each = grpo.view(len(work), -1).mean(dim=1)
        metrics: Metrics = {"policy_loss": each.detach()}
        asked = [row for w in work for row in w.reference or ()]
        if asked:
            kl = policy.kl_to_reference(reading.log_p, right_aligned(asked), reading.mask, weights.length)
            metrics["kl"] = kl.detach().view(len(work), -1).mean(dim=1)
            total = total + weights.kl * kl.view(len(work), -1).mean(dim=1)
        if self.direct:
            point, gap = losses.pointwise_loss(log_q, scores), losses.pairwise_loss(log_q, scores)
            metrics |= {"pointwise_loss": point.detach(), "pairwise_loss": gap.detach()}
            total = total + weights.pointwise * point + weights.pairwise * gap
        metrics["reward"] = torch.stack([w.rewards.mean() for w in work])
        metrics["trace_tokens"] = reading.mask.sum(dim=1).view(len(work), -1).mean(dim=1)
        return total, metrics | pair_metrics(losses.expected_score(log_q), scores)


class GRPO(GDSO):
    """The paper's baseline: the pointwise reward of the expected score alone, nothing on the score position."""

    pairwise = False
    direct = False


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
        chosen = self.settings.rollout
        each = 2 * chosen.traces
        samples = [one for pair in records for one in sides(pair, [None] * each)]
        traces = sample_traces(
            self.judge,
            samples,
            keyed(self.settings.seed, step, indices, each),
            max_tokens=chosen.max_tokens,
            temperature=chosen.temperature,
            batch_size=chosen.batch_size,
        )
        work = []
        for number, pair in enumerate(records):
            own = tuple(traces[number * each : (number + 1) * each])
            with torch.no_grad():
                old = read(self.judge, sides(pair, own), chosen.temperature)
                taught = read(self.teacher, sides(pair, own), chosen.temperature)
            levels = self._labels(old.log_q, step, indices[number])
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


def scores_of(pairs: Sequence[Pair], like: Tensor) -> Tensor:
    """Annotated scores, [B, 2]."""
    return torch.tensor([pair.scores for pair in pairs], device=like.device, dtype=like.dtype)


def keyed(seed: int, step: int, indices: Sequence[int], each: int) -> list[Any]:
    """A generator for each trace of a step's records."""
    return [
        draw(seed, "judge-trace", step=step, group=index, member=member) for index in indices for member in range(each)
    ]


METHODS: dict[str, Callable[[Judge, Any, Weights, Judge | None], Method]] = {
    "sft": Supervised,
    "bt": BradleyTerry,
    "grpo": GRPO,
    "gdso": GDSO,
    "risd": Distilled,
    "opd": OnPolicy,
}
