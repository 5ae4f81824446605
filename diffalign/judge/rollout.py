"""Samples of reasoning traces, many at once, with transformers' generate and its cache.

Every token is drawn from a generator of its own trace: greedy decoding of logits / temperature plus Gumbel noise is a sample
of the softmax. So a trace depends on its key alone, not on what else is in the batch, and a resumed run draws it again.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from diffalign.judge.forward import Sample, open_image
from diffalign.rewards.judge import Judge


class KeyedSampling(LogitsProcessor):
    """A processor of logits that adds each row's own Gumbel noise; temperature 0 adds none."""

    def __init__(self, generators: Sequence[np.random.Generator], temperature: float) -> None:
        self.generators, self.temperature = generators, temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.temperature == 0:
            return scores
        noise = np.stack([g.gumbel(size=scores.shape[-1]) for g in self.generators])
        return scores.float() / self.temperature + torch.from_numpy(noise).to(scores.device, torch.float32)


class AtMarker(StoppingCriteria):
    """A criterion that ends a row at the answer marker: the score is read, not sampled."""

    def __init__(self, marker: Sequence[int]) -> None:
        self.marker = torch.tensor(list(marker))

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        last = input_ids[:, -len(self.marker) :]
        return (last == self.marker.to(input_ids.device)).all(dim=-1)


@torch.no_grad()
def sample_traces(
    judge: Judge,
    samples: Sequence[Sample],
    generators: Sequence[np.random.Generator],
    *,
    max_tokens: int,
    temperature: float,
    batch_size: int,
) -> list[tuple[int, ...]]:
    """Sample a trace for each sample; return token ids, as `Sample.trace` takes them. generators: one for each."""
    ends = judge.model.generation_config.eos_token_id
    settings = GenerationConfig(
        max_new_tokens=max_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,  # models ship with others, which would make the samples another policy's
        no_repeat_ngram_size=0,
        eos_token_id=judge.tokenizer.eos_token_id if ends is None else ends,
        pad_token_id=judge.tokenizer.pad_token_id,
    )
    marker = judge.tokenizer(judge.wording.marker, add_special_tokens=False)["input_ids"]
    found: list[tuple[int, ...]] = []
    for start in range(0, len(samples), batch_size):
        part = samples[start : start + batch_size]
        inputs = judge.opening(
            [open_image(one.image) for one in part], [one.prompt for one in part], [one.dimension for one in part]
        )
        written = judge.model.generate(
            **inputs,
            generation_config=settings,
            logits_processor=LogitsProcessorList([KeyedSampling(generators[start : start + batch_size], temperature)]),
            stopping_criteria=StoppingCriteriaList([AtMarker(marker)]),
        )
        found += [trimmed(judge, row) for row in written[:, inputs["input_ids"].shape[1] :].tolist()]
    return found


def trimmed(judge: Judge, tokens: list[int]) -> tuple[int, ...]:
    """Return the trace without the line break before the marker, which is appended again with it."""
    trace = judge.trace(tokens)
    while trace and not str(judge.tokenizer.decode(trace[-1:])).strip():
        trace.pop()
    return tuple(trace)
