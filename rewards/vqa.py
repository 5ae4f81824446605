"""Questions about a prompt, answered by an image-text model: the probability of the right answer to each.

Soft-TIFA of GenEval 2 (Kamath et al. 2025, arXiv 2512.16853) is this with the questions of that suite: the probability of
the right answer at the first position of the reply, summed over its spellings (Yes, yes; four, Four, 4; with and without
a blank before), averaged over a prompt's questions (`vqa`) or multiplied and rooted (`geometric`). DPG-Bench, UniGenBench++
and WISE ask in the same form (`diffalign.bench`). A spelling counts by its first token, and each token counts once.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Unpack

import torch
from PIL import Image
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.rewards.base import Metadata, Prepared, by_column
from diffalign.rewards.vlm import VisionLanguageOptions, VisionLanguageReward, pictures, plain

WORDING = "{question} Answer in one word."
DIGITS = {
    "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8",
    "nine": "9", "ten": "10",
}  # fmt: skip
TOGETHER = 16
"""Questions in one forward pass. An image has several, so a batch of images is far more than that."""
MOST = 64
Question = tuple[str, str]


def questions_of(metadata: Metadata) -> list[Question]:
    """Return a prompt's (question, answer) pairs: `questions`, or GenEval 2's `vqa_list`. [] if there are none.

    Raises DiffalignError for another form.
    """
    found = metadata.get("questions", metadata.get("vqa_list")) or []
    if not isinstance(found, list) or not all(
        isinstance(q, list | tuple) and len(q) == 2 and all(isinstance(part, str) and part.strip() for part in q)
        for q in found
    ):
        raise DiffalignError("questions: a list of [question, answer] is expected")
    return [(q[0], q[1]) for q in found]


def spellings(answer: str) -> list[str]:
    """Return the ways to write an answer: small and capital, a number also as digits, each also after a blank."""
    word = answer.strip()
    forms = [word.lower(), word.capitalize(), word, *([DIGITS[word.lower()]] if word.lower() in DIGITS else [])]
    return list(dict.fromkeys(form for one in forms for form in (one, f" {one}")))


class VQA(VisionLanguageReward):
    """The mean probability of the right answers to a prompt's questions, which the prompt file gives.

    wording: contains {question}. most: the number of columns answer@1, answer@2, ..., one for each question. Do not use a
    model that thinks before it answers: its first token is not the answer.
    """

    name = "vqa"
    columns: tuple[str, ...] = ("vqa", "geometric")
    range = (0.0, 1.0)
    licence = "Apache-2.0 (this project); the model's own"
    weights = "Qwen/Qwen3-VL-8B-Instruct, or model="
    size = "17.5 GB"
    source = "arXiv 2512.16853 (Soft-TIFA)"
    repo = "Qwen/Qwen3-VL-8B-Instruct"
    reads = ("prompt", "metadata")

    def __init__(self, *, wording: str = WORDING, most: int = MOST, **shared: Unpack[VisionLanguageOptions]) -> None:
        super().__init__(**shared)
        if "{question}" not in wording:
            raise DiffalignError(f"reward vqa: wording {wording!r} has no {{question}} in it")
        if most < 1:
            raise DiffalignError(f"reward vqa: most={most}: at least one question is needed")
        self.wording = wording
        self.most = most
        self.columns = (*type(self).columns, *(f"answer@{k}" for k in range(1, most + 1)))

    def options(self) -> dict[str, Any]:
        return {**super().options(), "wording": self.wording}

    def reason_not_scorable(self, prompt: str | None, metadata: Metadata) -> str:
        if reason := super().reason_not_scorable(prompt, metadata):
            return reason
        try:
            asked = len(questions_of(metadata))
        except DiffalignError as error:
            return str(error)
        return (
            "no questions" if not asked else f"{asked} questions, above most={self.most}" if asked > self.most else ""
        )

    @torch.no_grad()
    def measure_prepared(
        self, items: Sequence[Prepared], prompts: list[str], metadata: list[Metadata] | None = None
    ) -> dict[str, Tensor]:
        metadata = metadata or [{}] * len(items)
        self.reasons = [self.reason_not_scorable(p, m) for p, m in zip(prompts, metadata, strict=True)]
        asked = [[] if reason else questions_of(m) for reason, m in zip(self.reasons, metadata, strict=True)]
        pairs = [(image, q) for image, qs in zip(pictures(items), asked, strict=True) for q in qs]
        answers = iter([p for k in range(0, len(pairs), TOGETHER) for p in self._answers(pairs[k : k + TOGETHER])])
        return by_column(self.columns, [self._row(qs, answers) for qs in asked])

    def _row(self, questions: list[Question], answers: Iterator[float]) -> tuple[float, ...]:
        """Return the values of one image: the arithmetic mean, the geometric mean, and every answer."""
        found = [next(answers) for _ in questions]
        if not found:
            return (math.nan,) * len(self.columns)
        geometric = math.exp(sum(map(math.log, found)) / len(found)) if all(found) else 0.0
        return (sum(found) / len(found), geometric, *found, *[math.nan] * (self.most - len(found)))

    def _answers(self, pairs: Sequence[tuple[Image.Image, Question]]) -> list[float]:
        """Return the probability of the right answer to each question about its image."""
        texts = [self.wording.replace("{question}", plain(question)) for _, (question, _) in pairs]
        batch = self.encode([image for image, _ in pairs], texts)
        chances = self.network(**batch, logits_to_keep=1).logits[:, -1].float().softmax(-1).cpu()
        return [
            min(1.0, float(row[self._first_tokens(answer)].sum()))
            for row, (_, (_, answer)) in zip(chances, pairs, strict=True)
        ]

    def _first_tokens(self, answer: str) -> list[int]:
        ids = self.processor.tokenizer(spellings(answer), add_special_tokens=False)["input_ids"]
        return sorted({one[0] for one in ids if one})
