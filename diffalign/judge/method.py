"""What every method offers the loop, and what those on pairs share."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from diffalign.draws import draw
from diffalign.judge.forward import Sample
from diffalign.judge.records import Pair
from diffalign.judge.rollout import sample_traces
from diffalign.rewards.judge import Judge

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


def scores_of(pairs: Sequence[Pair], like: Tensor) -> Tensor:
    """Annotated scores, [B, 2]."""
    return torch.tensor([pair.scores for pair in pairs], device=like.device, dtype=like.dtype)


def keyed(seed: int, step: int, indices: Sequence[int], each: int) -> list[Any]:
    """A generator for each trace of a step's records."""
    return [
        draw(seed, "judge-trace", step=step, group=index, member=member) for index in indices for member in range(each)
    ]


def sampled_traces(
    judge: Judge, settings: Any, step: int, indices: Sequence[int], records: Sequence[Pair]
) -> list[tuple[tuple[int, ...], ...]]:
    """`rollout.traces` traces of either side of each pair, w's then l's."""
    chosen = settings.rollout
    each = 2 * chosen.traces
    found = sample_traces(
        judge,
        [one for pair in records for one in sides(pair, [None] * each)],
        keyed(settings.seed, step, indices, each),
        max_tokens=chosen.max_tokens,
        temperature=chosen.temperature,
        batch_size=chosen.batch_size,
    )
    return [tuple(found[number * each : (number + 1) * each]) for number in range(len(records))]
