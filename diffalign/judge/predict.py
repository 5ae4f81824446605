"""A judge's distributions for images: for evaluation, and a teacher's for its student."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffalign.draws import draw
from diffalign.judge.forward import Sample, read
from diffalign.judge.rollout import sample_traces
from diffalign.rewards.judge import Judge


@dataclass(frozen=True)
class Thinking:
    """How a judge reasons. traces: how many distributions are averaged for an image; 0: the label at once."""

    traces: int = 1
    max_tokens: int = 512
    temperature: float = 1.0
    batch_size: int = 16


@dataclass(frozen=True)
class Predictions:
    """A judge's predictions. probabilities [N, 9], float32 on the CPU; tokens: written per image, with the label; seconds."""

    probabilities: Tensor
    tokens: float
    seconds: float


@torch.no_grad()
def predict(
    judge: Judge, samples: Sequence[Sample], thinking: Thinking, seed: int, tell: Callable[[int], None] | None = None
) -> Predictions:
    """Predict a distribution for each sample. Traces are averaged as probabilities, not as scores.

    tell: called with the number of finished images.
    """
    started = time.monotonic()
    repeats, tokens = max(1, thinking.traces), 0
    found = []
    size = max(1, thinking.batch_size // repeats)
    for start in range(0, len(samples), size):
        part = [one for one in samples[start : start + size] for _ in range(repeats)]
        if thinking.traces:
            keys = [(start + i // repeats, i % repeats) for i in range(len(part))]
            traces = sample_traces(
                judge,
                part,
                [draw(seed, "judge-evaluation", group=image, member=trace) for image, trace in keys],
                max_tokens=thinking.max_tokens,
                temperature=thinking.temperature,
                batch_size=len(part),
            )
            part = [replace(one, trace=trace) for one, trace in zip(part, traces, strict=True)]
            tokens += sum(map(len, traces))
        tokens += len(part)
        found.append(read(judge, part).log_q.exp().view(-1, repeats, 9).mean(dim=1).cpu())
        if tell:
            tell(min(start + size, len(samples)))
    return Predictions(torch.cat(found), tokens / len(samples), time.monotonic() - started)
