"""An image-text model that sees all images of a prompt in one context and scores each from 0 to 10.

As the listwise judges of documents do (GroupRank, arXiv 2511.11653), it sees them several times in other orders, and the
score is the mean over passes. A pass whose answer does not hold one number for each image is left out, never counted as 0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, Unpack

from diffalign.errors import DiffalignError
from diffalign.files.parse import parse_json
from diffalign.rewards.chat import answer_after_thought
from diffalign.rewards.chat_api import Answer, NoAnswer, Question
from diffalign.rewards.groupwise import NAN, GroupReward, ImageGroup, Rated, pass_columns
from diffalign.rewards.vlm_judge import ChatOptions, ChatReward

ASK = """The {count} images above were made by text-to-image models for the following prompt.

<prompt>
{prompt}
</prompt>

Compare them with each other: how well each shows what the prompt asks for, how sound its objects, bodies and light are, \
and how well it is made. Give each image a score from 0 (worst) to 10 (best). Use the range to tell images apart; equal \
scores are for images that you cannot tell apart. The order of the images means nothing.

Answer with JSON alone, one number for each image in the order in which they were shown:
{{"scores": [{example}]}}"""


class GroupJudge(GroupReward, ChatReward):
    """The mean score over passes, 0 to 10, and the standard deviation over passes.

    passes: how often a group is shown, each time in another order. largest: images in one context; of a prompt with more,
    parts are judged apart, and their scores compare less well.
    """

    name = "group_judge"
    columns: tuple[str, ...] = ("group_judge", "disagreement", *pass_columns(2))
    range = (0.0, 10.0)
    source = "arXiv 2511.11653, for images; the words are ours"

    def __init__(
        self, *, passes: int = 2, largest: int = 8, max_tokens: int = 256, **shared: Unpack[ChatOptions]
    ) -> None:
        super().__init__(**shared)
        if passes < 1 or largest < 2:
            raise DiffalignError("reward group_judge: passes must be at least 1, and largest at least 2")
        self.passes, self.largest, self.max_tokens = passes, largest, max_tokens
        self.columns = ("group_judge", "disagreement", *pass_columns(passes))
        self.api.logprobs = False
        self._held, self._failed = {}, {}

    def options(self) -> dict[str, Any]:
        return {"passes": self.passes, "largest": self.largest}

    def rate(self, groups: Sequence[ImageGroup]) -> list[list[Rated] | NoAnswer]:
        shown = [(group, group.order(number)) for group in groups for number in range(self.passes)]
        answers = self.api.ask([self._question(group, order) for group, order in shown])
        found: list[list[Rated] | NoAnswer] = []
        for at, group in enumerate(groups):
            mine = slice(at * self.passes, (at + 1) * self.passes)
            failed = next((a for a in answers[mine] if isinstance(a, NoAnswer)), None)
            given = [a for a in answers[mine] if isinstance(a, Answer)]
            found.append(failed or _rated(len(group.images), [order for _, order in shown[mine]], given))
        return found

    def _question(self, group: ImageGroup, order: Sequence[int]) -> Question:
        images = tuple((f"Image {place}:", group.images[i]) for place, i in enumerate(order, start=1))
        example = ", ".join("x" for _ in order)
        return Question(ASK.format(count=len(order), prompt=group.prompt, example=example), images, self.max_tokens)

    def row(self, rated: Rated) -> tuple[float, ...]:
        return (rated.score, rated.disagreement, *(v for one in rated.passes for v in one))


def _rated(count: int, orders: list[list[int]], answers: list[Answer]) -> list[Rated]:
    """Return each image's mean over the passes that can be read; without any, NaN with the last answer."""
    read = [scores_in(answer.text, count) for answer in answers]
    last = next((a.text for a, scores in zip(answers, read, strict=True) if scores is None), "")
    found = []
    for image in range(count):
        passes = []
        for order, scores in zip(orders, read, strict=True):
            place = order.index(image)
            passes.append((NAN, NAN) if scores is None else (scores[place], place / (count - 1)))
        given = [score for score, _ in passes if math.isfinite(score)]
        if not given:
            reason = f"no {count} scores from 0 to 10 in the answer {last[:120]!r}"
            found.append(Rated(NAN, tuple(passes), reason=reason))
            continue
        mean = sum(given) / len(given)
        spread = math.sqrt(sum((s - mean) ** 2 for s in given) / len(given)) if len(given) > 1 else NAN
        found.append(Rated(mean, tuple(passes), spread))
    return found


def scores_in(text: str, count: int) -> list[float] | None:
    """Return the scores of an answer, past a thought; None unless its last JSON object has one from 0 to 10 for each."""
    objects = re.findall(r"\{[^{}]*\}", answer_after_thought(text) or "")
    try:
        found = parse_json(objects[-1])["scores"] if objects else None
    except (ValueError, KeyError, TypeError):
        return None
    if not isinstance(found, list) or len(found) != count:
        return None
    if any(isinstance(s, bool) or not isinstance(s, int | float) or not 0 <= s <= 10 for s in found):
        return None
    return [float(s) for s in found]
