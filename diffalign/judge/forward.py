"""One pass of a judge over images with reasoning traces: its distribution at the score position, each token's probability."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.files.images import Unreadable, decode, read_file
from diffalign.rewards.judge import Judge


@dataclass(frozen=True)
class Sample:
    """An image and what is asked about it. trace: token ids between question and marker; None: the label at once."""

    prompt: str
    dimension: str
    image: Path
    trace: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Reading:
    """The log-probabilities of one pass.

    log_q [N, 9]: at the score position, over the nine levels. log_p, mask [N, T]: of the trace's tokens, right-aligned; the
    tokens of the marker follow them where `read` was asked for these.
    """

    log_q: Tensor
    log_p: Tensor
    mask: Tensor

    def rows(self) -> list[Tensor]:
        """Return the log-probabilities of each sample's own tokens, detached."""
        return [p[m.bool()].detach() for p, m in zip(self.log_p, self.mask, strict=True)]


def open_image(path: Path) -> Image.Image:
    """Open an image as RGB. Raises DiffalignError where the file is no image."""
    try:
        return decode(read_file(path))
    except Unreadable as error:
        raise DiffalignError(f"{path}: cannot be read as an image ({error})") from error


def right_aligned(rows: Sequence[Tensor]) -> Tensor:
    """Stack rows of different lengths as [N, T], zeros before them: the form of `Reading.log_p`."""
    longest = max((len(row) for row in rows), default=0)
    return torch.stack([torch.cat([row.new_zeros(longest - len(row)), row]) for row in rows])


def read(judge: Judge, samples: Sequence[Sample], temperature: float = 1.0, marker: bool = False) -> Reading:
    """Pass samples through the judge. All of them have a trace, or none has; ValueError otherwise.

    temperature: that with which tokens were sampled; their log-probabilities belong to that policy. The score's is 1.
    marker: count the marker's tokens as the trace's, so that a model learns when to stop reasoning.
    """
    traces = [sample.trace for sample in samples if sample.trace is not None]
    if traces and len(traces) < len(samples):
        raise ValueError("samples with and without a trace cannot share a pass")
    inputs = judge.inputs(
        [open_image(sample.image) for sample in samples],
        [sample.prompt for sample in samples],
        [sample.dimension for sample in samples],
        traces if traces else None,
    )
    if not traces:
        log_q = judge.logits(inputs).log_softmax(dim=-1)
        empty = log_q.new_zeros(len(samples), 0)
        return Reading(log_q, empty, empty)
    tail = judge.marker_length(reasoning=True)
    longest = max(map(len, traces))
    keep = longest + tail + 1
    logits = judge.model(**inputs, logits_to_keep=keep, use_cache=False).logits
    # Position i predicts token i + 1; the window's first position predicts the longest trace's first token.
    tokens = inputs["input_ids"][:, -(keep - 1) :]
    log_p = (logits[:, :-1].float() / temperature).log_softmax(dim=-1).gather(-1, tokens[..., None])[..., 0]
    lengths = torch.tensor([len(trace) for trace in traces], device=log_p.device)
    own = torch.arange(keep - 1, device=log_p.device)[None] >= longest - lengths[:, None]
    if not marker:
        log_p, own = log_p[:, :longest], own[:, :longest]
    log_q = judge.closed(logits[:, -1]).log_softmax(dim=-1)
    return Reading(log_q, log_p * own, own.to(log_p.dtype))
