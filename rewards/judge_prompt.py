"""The words that ask a judge for a rating, and the file that keeps them beside a judge that was trained on them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.errors import DiffalignError
from diffalign.files.parse import parse_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LABELS = {"digits": tuple("123456789"), "letters": tuple("ABCDEFGHI")}
SETTINGS = "judge.json"
"""The file beside a trained judge with its labels, rubrics and wording."""


@dataclass(frozen=True)
class Wording:
    """The text of a question, in the order in which it is written. The part before the rubric is equal for all
    dimensions.

    question: with {prompt}. ask: with {rubric}, {scale} and {how}. direct, reasoning: {how} for a judge that answers at
    once, and for one that first gives reasons. marker: the text before the label. It ends with a line break, which no
    tokenizer of these families joins with the label, whereas many join a space and a letter.
    """

    question: str = (
        "A text-to-image model painted this picture for the following prompt.\n\n<prompt>\n{prompt}\n</prompt>\n\n"
    )
    ask: str = "{rubric}\n\nHalf levels are for what lies between two levels. There are nine labels: {scale}.\n{how}"
    direct: str = "Answer with the label alone."
    reasoning: str = (
        "First name, in a few sentences, what you see that bears on this dimension. "
        "Then write Score: and, on the next line, the label."
    )
    marker: str = "Score:\n"

    def __post_init__(self) -> None:
        for field, place in (("question", "{prompt}"), ("ask", "{rubric}"), ("ask", "{how}")):
            if place not in asdict(self)[field]:
                raise DiffalignError(f"wording: {field} has no {place} in it")
        if not self.marker.strip():
            raise DiffalignError("wording: marker is empty; the label needs something to follow")

    def rating(self, rubric: str, labels: Sequence[str], levels: Sequence[float], reasoning: bool = False) -> str:
        """Return the part of a question that asks for one of `labels`, which stand for `levels`, by a rubric."""
        scale = ", ".join(f"{label} = level {level:g}" for label, level in zip(labels, levels, strict=True))
        how = self.reasoning if reasoning else self.direct
        return self.ask.replace("{scale}", scale).replace("{how}", how).replace("{rubric}", rubric).strip()


def escaped(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text with a space inside every special token of the tokenizer, such as <|im_end|>.

    The words stay readable for the model, but end no turn and ask for no second image.
    """
    marks = {str(token) for token in tokenizer.added_tokens_decoder.values()} | {*tokenizer.all_special_tokens}
    marks |= {"<think>", "</think>"}
    for mark in sorted((m.strip() for m in marks if m.strip()), key=len, reverse=True):
        text = text.replace(mark, f"{mark[0]} {mark[1:]}" if len(mark) > 1 else " ")
    return text


def write_settings(folder: Path, labels: str, rubrics: dict[str, str], wording: Wording) -> None:
    """Write the file that `load_settings` reads."""
    stored = {"labels": labels, "rubrics": rubrics, "wording": asdict(wording)}
    (folder / SETTINGS).write_text(json.dumps(stored, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_settings(folder: Path) -> dict[str, Any]:
    """Return labels, rubrics and wording of a judge that `Judge.save` wrote; {} for any other model."""
    path = folder / SETTINGS
    if not path.is_file():
        return {}
    try:
        stored = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DiffalignError(f"{path}: not JSON ({error})") from error
    rubrics, wording = (texts(stored.get(k) if isinstance(stored, dict) else None) for k in ("rubrics", "wording"))
    words = [f.name for f in fields(Wording)]
    if not rubrics or sorted(wording) != sorted(words) or str(stored.get("labels")) not in LABELS:
        raise DiffalignError(
            f"{path}: needs labels ({', '.join(LABELS)}), rubrics (dimension to text) and wording ({', '.join(words)})"
        )
    return {"labels": stored["labels"], "rubrics": rubrics, "wording": Wording(**wording)}


def texts(found: object) -> dict[str, str]:
    """Return a dict of texts unchanged, {} for anything else."""
    return found if isinstance(found, dict) and all(isinstance(v, str) for v in found.values()) else {}
