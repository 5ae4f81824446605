"""VQAScore (Lin et al. 2024, arXiv 2404.01291): the probability that a model answers "Yes" when asked about the prompt.

The definition is P("Yes" | image, question) over the whole vocabulary at the first position of the answer, as
t2v_metrics 3.1 computes it. It is not P(Yes) / (P(Yes) + P(No)), which the column `closed` gives. The paper's
CLIP-FlanT5 scores average over the tokens [Yes, </s>], so they are sqrt(P(Yes) P(</s> | Yes)); that model does not run
on transformers 5 and is not included. Scores of different models cannot be compared.
"""

from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.rewards.base import Metadata, Prepared
from diffalign.rewards.vlm import VisionLanguageOptions, VisionLanguageReward, pictures, plain

QUESTION = 'Does this figure show "{prompt}"? Please answer Yes or No.'


def yes_probability(logits: Tensor, yes: int, no: int) -> tuple[Tensor, Tensor]:
    """Return (P(Yes), P(Yes) / (P(Yes) + P(No))) of next-token logits [B, V], float32 [B] each."""
    wide = logits.float()
    return wide.softmax(-1)[:, yes], (wide[:, yes] - wide[:, no]).sigmoid()


class VQAScore(VisionLanguageReward):
    """The probability of "Yes" to a question about the prompt.

    question: contains {prompt}. Do not use a model that thinks before it answers: its first token is not the answer.
    """

    name = "vqascore"
    columns = ("vqascore", "closed")
    range = (0.0, 1.0)
    licence = "Apache-2.0 (definition); the model's own"
    weights = "Qwen/Qwen2.5-VL-7B-Instruct, or model="
    size = "16.6 GB"
    source = "arXiv 2404.01291"
    repo = "Qwen/Qwen2.5-VL-7B-Instruct"

    def __init__(self, *, question: str = QUESTION, **shared: Unpack[VisionLanguageOptions]) -> None:
        super().__init__(**shared)
        if "{prompt}" not in question:
            raise DiffalignError(f"reward vqascore: question {question!r} has no {{prompt}} in it")
        self.question = question

    def options(self) -> dict[str, Any]:
        return {**super().options(), "question": self.question}

    @torch.no_grad()
    def measure_prepared(
        self, items: Sequence[Prepared], prompts: list[str], metadata: list[Metadata] | None = None
    ) -> dict[str, Tensor]:
        self.reasons = [""] * len(items)
        texts = [self.question.replace("{prompt}", plain(prompt)) for prompt in prompts]
        batch = self.encode(pictures(items), texts)
        logits = self.network(**batch, logits_to_keep=1).logits[:, -1]
        found = yes_probability(logits, self.one_token("Yes"), self.one_token("No"))
        return {name: values.cpu() for name, values in zip(self.columns, found, strict=True)}
