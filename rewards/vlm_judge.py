"""Any image-text model as a judge, behind an OpenAI-compatible address: rubric in, distribution over levels out.

The model is asked for one of nine labels, as in `judge.py`. Where the server returns the probabilities of the
alternatives at the label's place, they are the distribution; elsewhere the label that was written is the score. An answer
without a label is NaN with the answer as the reason, never a number.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from PIL import Image
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.rewards.base import Metadata, Prepared, PreparedReward, Reward, by_column
from diffalign.rewards.chat import answer_after_thought
from diffalign.rewards.chat_api import Answer, ChatAPI, NoAnswer, Question
from diffalign.rewards.judge_prompt import LABELS, Wording
from diffalign.rewards.rubric import DIMENSIONS, load_rubrics
from diffalign.rewards.score_distribution import LEVELS, ScoreDistribution
from diffalign.rewards.vlm import pictures

NAN = float("nan")
COVERED = 0.5
"""The least share of the probability that must lie on labels for it to be a distribution over them."""


class ChatOptions(TypedDict, total=False):
    """Options of every judge behind an address; `ChatReward` and `ChatAPI` explain them."""

    url: str
    model: str
    key_env: str
    retries: int
    timeout: float
    concurrency: int


class ChatReward(Reward):
    """A reward that asks a model behind an address.

    url: the base address, such as http://localhost:8000/v1. model: the name that the server has for the model. key_env:
    the environment variable with the key. retries, timeout (seconds), concurrency: of requests. max_tokens: of an answer.
    """

    licence = "the model's own"
    weights = "url=ADDRESS of a server, model=NAME"
    size = "the server's"

    def __init__(
        self,
        *,
        url: str = "",
        model: str = "",
        key_env: str = "OPENAI_API_KEY",
        retries: int = 4,
        timeout: float = 120.0,
        concurrency: int = 8,
    ) -> None:
        for name, value in (("url", url), ("model", model)):
            if not value:
                raise DiffalignError(
                    f"reward {self.name}: {name}= is needed, as in {self.name}:url=http://localhost:8000/v1,model=NAME"
                )
        try:
            self.api = ChatAPI(str(url), str(model), str(key_env), retries, timeout, concurrency)
        except DiffalignError as error:
            raise DiffalignError(f"reward {self.name}: {error}") from error
        self.reasons = []

    def weights_id(self) -> str:
        # Not the address: the same model elsewhere gives the same scores, and an address may say whose it is.
        return f"{self.api.model} behind an address"


class VLMJudge(ChatReward, PreparedReward):
    """The mean over dimensions of a model's rating, 1 to 5.

    dimensions: as of zreward, names of our rubrics, NAME=FILE, or FILE, as a list or joined by "+"; default: our four.
    mix: weights of the dimensions, "alignment=2+realism=1"; missing ones are 0. Each dimension is one request.
    """

    name = "vlm_judge"
    columns: tuple[str, ...] = ("vlm_judge",)
    range = (1.0, 5.0)
    source = "rubrics as arXiv 2606.09076 has them; the distribution as arXiv 2303.16634"

    def __init__(
        self,
        *,
        dimensions: str | Sequence[str | Path] | None = None,
        mix: Mapping[str, float] | str | None = None,
        max_tokens: int = 16,
        **shared: Unpack[ChatOptions],
    ) -> None:
        super().__init__(**shared)
        wanted = dimensions.split("+") if isinstance(dimensions, str) else dimensions
        self.rubrics = load_rubrics(wanted or DIMENSIONS)
        self.dimensions = tuple(self.rubrics)
        self.max_tokens = max_tokens
        self.wording = Wording()
        self.weight = self._weights(mix)
        moments = [name for d in self.dimensions for name in (d, f"{d}_spread")]
        self.columns = ("vlm_judge", *moments, *(f"{d}@{level:.1f}" for d in self.dimensions for level in LEVELS))
        self._answers: dict[tuple[str, str, str], Answer] = {}

    def _weights(self, mix: Mapping[str, float] | str | None) -> list[float]:
        try:
            if isinstance(mix, str):
                mix = {
                    name.strip(): float(value) for name, _, value in (part.partition("=") for part in mix.split("+"))
                }
            even = torch.full((1, len(self.dimensions), len(LEVELS)), 1 / len(LEVELS))
            return [float(w) for w in ScoreDistribution(even, LEVELS, self.dimensions).weights(mix)]
        except (ValueError, DiffalignError) as error:
            raise DiffalignError(f"reward vlm_judge: mix: {error}; write NAME=WEIGHT+NAME=WEIGHT") from error

    def options(self) -> dict[str, Any]:
        words = json.dumps([self.rubrics, asdict(self.wording)], sort_keys=True).encode()
        return {
            "mix": dict(zip(self.dimensions, self.weight, strict=True)),
            "words": hashlib.blake2b(words, digest_size=6).hexdigest(),
        }

    def measure_prepared(
        self, items: Sequence[Prepared], prompts: list[str], metadata: list[Metadata] | None = None
    ) -> dict[str, Tensor]:
        """Return the columns. Raises NoAnswer if a request failed; what was answered is not asked again."""
        images = pictures(items)
        keys = [
            (hashlib.sha256(image.tobytes()).hexdigest() + repr(image.size), prompt, dimension)
            for image, prompt in zip(images, prompts, strict=True)
            for dimension in self.dimensions
        ]
        whose = {key: images[n // len(self.dimensions)] for n, key in enumerate(keys)}
        todo = [key for key in whose if key not in self._answers]
        failed = []
        for key, answer in zip(todo, self.api.ask([self._question(whose[key], *key[1:]) for key in todo]), strict=True):
            if isinstance(answer, NoAnswer):
                failed.append(answer)
            else:
                self._answers[key] = answer
        if failed:
            raise failed[0]
        self.reasons, rows = [], []
        for n in range(len(images)):
            answers = [self._answers[key] for key in keys[n * len(self.dimensions) : (n + 1) * len(self.dimensions)]]
            row, reason = self._row(answers)
            rows.append(row)
            self.reasons.append(reason)
        for key in keys:
            self._answers.pop(key, None)
        return by_column(self.columns, rows)

    def _question(self, image: Image.Image, prompt: str, dimension: str) -> Question:
        ask = self.wording.rating(self.rubrics[dimension], LABELS["digits"], LEVELS)
        return Question(self.wording.question.replace("{prompt}", prompt) + ask, (("", image),), self.max_tokens)

    def _row(self, answers: list[Answer]) -> tuple[tuple[float, ...], str]:
        """Return a row of all columns and the reason why it has no score, "" if it has one."""
        found = [rating(answer) for answer in answers]
        reasons = [
            f"{d}: no label from 1 to 9 in the answer {answer.text[:120]!r}"
            for d, one, answer in zip(self.dimensions, found, answers, strict=True)
            if one is None
        ]
        moments: list[float] = []
        bins: list[float] = []
        total = 0.0
        for weight, one in zip(self.weight, found, strict=True):
            mean, spread, probabilities = one or (NAN, NAN, [NAN] * len(LEVELS))
            moments += [mean, spread]
            bins += probabilities
            total += weight * mean if weight else 0.0
        return (total, *moments, *bins), "; ".join(reasons)


def rating(answer: Answer) -> tuple[float, float, list[float]] | None:
    """Return (mean, spread, probabilities) of a model's answer; None if it holds no label.

    Without probabilities, spread and probabilities are NaN: one label says nothing of the others.
    """
    place = written_label(answer.text)
    if place is None:
        return None
    held = distribution(answer)
    if held is None:
        return LEVELS[place], NAN, [NAN] * len(LEVELS)
    made = ScoreDistribution(torch.tensor([[held]], dtype=torch.float64).float())
    return float(made.mean), float(made.spread), [float(p) for p in made.probabilities[0, 0]]


def written_label(text: str) -> int | None:
    """Return the place of the label in a model's text, past a thought: the text alone, or what follows the last "Score:"."""
    said = (answer_after_thought(text) or "").strip()
    found = re.fullmatch(r"\W*([1-9])\W*", said) or re.search(r"score\W*([1-9])\W*$", said, re.IGNORECASE)
    return LABELS["digits"].index(found[1]) if found else None


def distribution(answer: Answer) -> list[float] | None:
    """Return the probabilities of the nine labels at the last token that is one, summing to 1; None if there are none."""
    for token in reversed(answer.tokens):
        if token.text.strip() in LABELS["digits"] and len(token.top) > 1:
            held = [sum(p for text, p in token.top.items() if text.strip() == label) for label in LABELS["digits"]]
            return [p / sum(held) for p in held] if sum(held) >= COVERED else None
    return None
