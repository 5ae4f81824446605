"""UnifiedReward 2.0 (Wang et al., arXiv 2503.05236 and its repository): a model that writes three scores from 1 to 5.

An answer in which a score is missing gives NaN, with the text as the reason. Trainers that map it to 0 teach the model
to avoid whatever the judge answers badly. A thought before the answer is left out. A score slightly off the scale
(0.99) is taken as it is written: the model regresses, and nothing clips it.
"""

import re
from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from diffalign.rewards.base import Metadata, Prepared, by_column
from diffalign.rewards.chat import answer_after_thought, without_special
from diffalign.rewards.vlm import VisionLanguageOptions, VisionLanguageReward, pictures, plain

AXES = ("alignment", "coherence", "style")
NEW_TOKENS = 256
LOWEST, HIGHEST = 0.5, 5.5
"""What rounds to a score of the scale; anything else is no answer to the question."""
# The exact words are the model's interface: those of the repository's point_score_ACS_image_generation.py for 2.0.
INSTRUCTION = """You are presented with a generated image and its associated text caption. \
Your task is to analyze the image across multiple dimensions in relation to the caption. Specifically:
Provide overall assessments for the image along the following axes (each rated from 1 to 5):
- Alignment Score: How well the image matches the caption in terms of content.
- Coherence Score: How logically consistent the image is (absence of visual glitches, object distortions, etc.).
- Style Score: How aesthetically appealing the image looks, regardless of caption accuracy.

Output your evaluation using the format below:

Alignment Score (1-5): X
Coherence Score (1-5): Y
Style Score (1-5): Z

Your task is provided as follows:
Text Caption: [{prompt}]"""


def parse(answer: str) -> tuple[float, ...] | None:
    """Return (alignment, coherence, style) of a model's text; None unless each occurs once, near the scale 1 to 5."""
    found = written_scores(answer_after_thought(answer) or "")
    return found if found and all(LOWEST <= score <= HIGHEST for score in found) else None


def written_scores(answer: str) -> tuple[float, ...] | None:
    """Return the three scores of an answer as they are written; None unless each axis has exactly one value."""
    found = []
    for axis in AXES:
        scores = re.findall(
            rf"{axis} score\s*\(1-5\)\s*:\s*\**\s*([0-9]+(?:\.[0-9]+)?)(?![0-9.]*/)", answer, re.IGNORECASE
        )
        values = {float(s) for s in scores}
        if len(values) != 1:
            return None
        found.append(values.pop())
    return tuple(found)


def reason_unread(answer: str, limit: int) -> str:
    """Return why `parse` found nothing in the text of a model that may write `limit` tokens."""
    said = answer_after_thought(answer)
    if said is None:
        return f"the model's thought did not end within max_new_tokens={limit}: {answer[:200]!r}"
    off = "a score outside 1 to 5" if written_scores(said) else "no three scores"
    return f"{off} in the model's answer {said[:200]!r}"


class UnifiedReward(VisionLanguageReward):
    """Score: the mean of the three axes, which are the other columns. Decoded greedily.

    max_new_tokens: an answer has about 80, since scores such as 2.694700002670288 take a token a digit.
    """

    name = "unifiedreward"
    columns = ("mean", *AXES)
    range = (LOWEST, HIGHEST)
    usual = "1 to 5"
    licence = "MIT (code); the weights' card says which for them"
    weights = "CodeGoat24/UnifiedReward-2.0-qwen-7b, or model="
    size = "16.6 GB"
    source = "arXiv 2503.05236, github.com/CodeGoat24/UnifiedReward"
    version = "2"
    repo = "CodeGoat24/UnifiedReward-2.0-qwen-7b"

    def __init__(self, *, max_new_tokens: int = NEW_TOKENS, **shared: Unpack[VisionLanguageOptions]) -> None:
        super().__init__(**shared)
        self.max_new_tokens = max_new_tokens

    def options(self) -> dict[str, Any]:
        return super().options() | (
            {} if self.max_new_tokens == NEW_TOKENS else {"max_new_tokens": self.max_new_tokens}
        )

    @torch.no_grad()
    def measure_prepared(
        self, items: Sequence[Prepared], prompts: list[str], metadata: list[Metadata] | None = None
    ) -> dict[str, Tensor]:
        texts = [INSTRUCTION.replace("{prompt}", plain(prompt)) for prompt in prompts]
        batch = self.encode(pictures(items), texts)
        written = self.network.generate(**batch, max_new_tokens=self.max_new_tokens, do_sample=False)
        # With special tokens, since the end of a thought may be one.
        tokenizer = self.processor.tokenizer
        answers = tokenizer.batch_decode(written[:, batch["input_ids"].shape[1] :], skip_special_tokens=False)
        return self.read([without_special(answer, tokenizer) for answer in answers])

    def read(self, answers: list[str]) -> dict[str, Tensor]:
        """Return the columns of the model's answers; sets `reasons`."""
        self.reasons, rows = [], []
        for answer in answers:
            scores = parse(answer)
            self.reasons.append("" if scores else reason_unread(answer, self.max_new_tokens))
            rows.append((sum(scores) / 3, *scores) if scores else (float("nan"),) * len(self.columns))
        return by_column(self.columns, rows)
