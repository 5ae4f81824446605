"""What every method of training a judge offers, and what those on pairs share."""

from collections.abc import Sequence
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from diffalign.config import JudgeConfig
from diffalign.draws import draw
from diffalign.judge.forward import Sample
from diffalign.judge.records import RatedPair
from diffalign.judge.rollout import sample_traces
from diffalign.rewards.judge import Judge
from diffalign.training.protocols import Weights

Metrics = dict[str, Tensor]
Record = TypeVar("Record", contravariant=True)
Prepared = TypeVar("Prepared")


class JudgeMethod(Protocol[Record, Prepared]):
    """A way of training a judge: what is done once a step for each record, and the loss of every update."""

    def prepare(
        self, step: int, indices: Sequence[int], records: Sequence[Record], reference: Weights | None
    ) -> list[Prepared]:
        """Prepare a step's records, with the policy as it is: sample traces, ask a teacher.

        indices: of the records in the data set; reference: the policy of the outer iteration, where there is one.
        """

    def loss(self, prepared: Sequence[Prepared], first: bool) -> tuple[Tensor, Metrics]:
        """Return losses [n] and metrics [n] of n prepared records. first: the policy is still the one that prepared them."""


def sides(pair: RatedPair, traces: Sequence[tuple[int, ...] | None]) -> list[Sample]:
    """Return the samples of a pair: all traces of the better image, then all of the worse; `traces` in that order."""
    each = len(traces) // 2
    return [Sample(pair.prompt, pair.dimension, pair.images[i // each], trace) for i, trace in enumerate(traces)]


def pair_metrics(mu: Tensor, scores: Tensor) -> Metrics:
    """Measure expected scores [B, 2, G]: the error of a side's mean, and whether the better image got the higher one."""
    mean = mu.detach().mean(dim=-1)
    return {"score_error": (mean - scores).abs().mean(dim=1), "accuracy": (mean[:, 0] > mean[:, 1]).to(mu.dtype)}


def scores_of(pairs: Sequence[RatedPair], like: Tensor) -> Tensor:
    """Return the annotated scores, [B, 2]."""
    return torch.tensor([pair.scores for pair in pairs], device=like.device, dtype=like.dtype)


def keyed(seed: int, step: int, indices: Sequence[int], each: int) -> list[np.random.Generator]:
    """Return a generator for each trace of a step's records."""
    return [
        draw(seed, "judge-trace", step=step, group=index, member=member) for index in indices for member in range(each)
    ]


def sampled_traces(
    judge: Judge, config: JudgeConfig, step: int, indices: Sequence[int], records: Sequence[RatedPair]
) -> list[tuple[tuple[int, ...], ...]]:
    """Sample `rollout.traces` traces of either side of each pair, w's then l's."""
    chosen = config.rollout
    each = 2 * chosen.traces
    found = sample_traces(
        judge,
        [one for pair in records for one in sides(pair, [None] * each)],
        keyed(config.seed, step, indices, each),
        max_tokens=chosen.max_tokens,
        temperature=chosen.temperature,
        batch_size=chosen.batch_size,
    )
    return [tuple(found[number * each : (number + 1) * each]) for number in range(len(records))]
