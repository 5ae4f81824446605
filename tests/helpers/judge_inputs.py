"""Images, prompts and rubrics for judges."""

from __future__ import annotations

import pytest

from diffalign.errors import DiffalignError
from helpers import pictures

IMAGES = [pictures.smooth(1, 96, 64), pictures.smooth(2, 60, 60), pictures.smooth(3, 120, 50)]


PROMPTS = ["a cat", "a much longer prompt, with commas, and a {rubric} in it", "dogs"]


RUBRICS = {
    "alignment": "Dimension: alignment. Level 5: all of it.",
    "realism": "Dimension: realism. Level 5: a photograph.",
}


SIDE = {"qwen2_vl": 56, "qwen3_vl": 64, "qwen3_5": 64}


def one_line(error: pytest.ExceptionInfo[DiffalignError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)
