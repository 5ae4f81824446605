"""UnifiedReward-Think (arXiv 2505.03318) and UnifiedReward-Flex: models that compare two images and give reasons first.

Each pair of a prompt's images is shown in both orders. An image's score is the share of its comparisons that it wins. A
comparison without a verdict is left out; an image without any is NaN with an answer as the reason.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Unpack

import torch
from PIL import Image

from diffalign.errors import DiffalignError
from diffalign.rewards.chat import without_special, written_chat
from diffalign.rewards.chat_api import NoAnswer
from diffalign.rewards.groupwise import NAN, GroupReward, ImageGroup, Rated, pass_columns
from diffalign.rewards.vlm import VisionLanguageOptions, VisionLanguageReward, plain

FOLDER = Path(__file__).parent


class PairReward(GroupReward, VisionLanguageReward):
    """The share of won comparisons with the other images of the prompt, 0 to 1; a draw cannot be said.

    largest: images of a prompt that are compared with each other, in K (K - 1) answers. max_new_tokens: of one answer.
    """

    range = (0.0, 1.0)
    licence = "MIT (code); the weights' card says which for them"
    size = "17.5 GB"
    passes = 2
    instructions: ClassVar[dict[str, str]]
    """The published words, by the family of the weights."""

    def __init__(
        self,
        *,
        template: str | None = None,
        largest: int = 4,
        max_new_tokens: int = 4096,
        **shared: Unpack[VisionLanguageOptions],
    ) -> None:
        super().__init__(**shared)
        self.template = template or next(iter(self.instructions))
        if self.template not in self.instructions:
            raise DiffalignError(
                f"reward {self.name}: template {template!r}; one of {', '.join(self.instructions)}, by the model"
            )
        if largest < 2:
            raise DiffalignError(f"reward {self.name}: largest must be at least 2")
        self.largest, self.max_new_tokens = largest, max_new_tokens
        self.instruction = (FOLDER / self.instructions[self.template]).read_text(encoding="utf-8")
        self._held, self._failed = {}, {}

    def options(self) -> dict[str, Any]:
        return {
            **super().options(),
            "template": self.template,
            "largest": self.largest,
            "max_new_tokens": self.max_new_tokens,
        }

    @staticmethod
    def verdict(answer: str) -> int | None:
        """Return 0 if the first image is better, 1 if the second one is, None where an answer says neither or both."""
        raise NotImplementedError

    def rate(self, groups: Sequence[ImageGroup]) -> list[list[Rated] | NoAnswer]:
        return [self._compared(group) for group in groups]

    def _compared(self, group: ImageGroup) -> list[Rated]:
        """Return each image's share of wins, and that when it was shown first and when it was shown second."""
        count = len(group.images)
        won: list[tuple[list[float], list[float]]] = [([], []) for _ in range(count)]
        unread = ""
        for first, second in itertools.permutations(range(count), 2):
            answer = self.answer(group.images[first], group.images[second], group.prompt)
            better = self.verdict(answer)
            if better is None:
                unread = answer
                continue
            won[first][0].append(float(better == 0))
            won[second][1].append(float(better == 1))
        reason = f"no verdict in the model's answer {unread[-200:]!r}" if unread else ""
        return [Rated(_mean(a + b), ((_mean(a), 0.0), (_mean(b), 1.0)), reason="" if a + b else reason) for a, b in won]

    @torch.no_grad()
    def answer(self, first: Image.Image, second: Image.Image, prompt: str) -> str:
        """Return what the model writes about two images, decoded greedily."""
        text = self.instruction.replace("{prompt}", plain(prompt))
        content = [
            {"type": "image", "image": first},
            {"type": "image", "image": second},
            {"type": "text", "text": text},
        ]
        written = written_chat(self.processor, [{"role": "user", "content": content}])
        batch = self.processor(text=[written], images=[[first, second]], return_tensors="pt")
        given = {
            name: value.to(self.device, self.dtype) if value.is_floating_point() else value.to(self.device)
            for name, value in batch.items()
        }
        made = self.network.generate(**given, max_new_tokens=self.max_new_tokens, do_sample=False)
        # With special tokens, since the end of a thought may be one.
        said = self.processor.tokenizer.decode(made[0, given["input_ids"].shape[1] :], skip_special_tokens=False)
        return without_special(said, self.processor.tokenizer)


class UnifiedRewardThink(PairReward):
    """template: `qwen3vl` for UnifiedReward-Think-qwen3vl and -qwen35, `qwen` for UnifiedReward-Think-qwen-7b."""

    name = "unifiedreward_think"
    columns = ("unifiedreward_think", *pass_columns(2))
    weights = "CodeGoat24/UnifiedReward-Think-qwen3vl-8b, or model="
    source = "arXiv 2505.03318, github.com/CodeGoat24/UnifiedReward"
    repo = "CodeGoat24/UnifiedReward-Think-qwen3vl-8b"
    instructions: ClassVar[dict[str, str]] = {
        "qwen3vl": "unifiedreward_think_qwen3vl.txt",
        "qwen": "unifiedreward_think_qwen.txt",
    }

    @staticmethod
    def verdict(answer: str) -> int | None:
        """Return the verdict in the one <answer> that follows the thought."""
        _, ended, rest = answer.rpartition("</think>")
        found = re.findall(r"<answer>\s*(.*?)\s*</answer>", rest if ended else "", re.DOTALL)
        return {"Image 1 is better": 0, "Image 2 is better": 1}.get(found[0]) if len(found) == 1 else None


class UnifiedRewardFlex(PairReward):
    """Compares on dimensions that it chooses for each prompt."""

    name = "unifiedreward_flex"
    columns = ("unifiedreward_flex", *pass_columns(2))
    weights = "CodeGoat24/UnifiedReward-Flex-qwen3vl-8b, or model="
    source = "github.com/CodeGoat24/UnifiedReward, UnifiedReward-Flex"
    repo = "CodeGoat24/UnifiedReward-Flex-qwen3vl-8b"
    instructions: ClassVar[dict[str, str]] = {"flex": "unifiedreward_flex.txt"}

    @staticmethod
    def verdict(answer: str) -> int | None:
        """Return the overall `winner` of the JSON; those of its categories have another key."""
        found = re.findall(r'"winner"\s*:\s*"Image ([12])"', answer)
        return int(found[0]) - 1 if len(found) == 1 else None


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else NAN
