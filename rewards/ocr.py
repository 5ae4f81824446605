"""Does the image show the quoted text? Flow-GRPO's OCR reward (Liu et al. 2025, arXiv 2505.05470) on rapidocr.

The target is the first text in straight double quotes; a line break in it is a space, and empty quotes are no text.
Recognised lines are joined in reading order without a separator; both strings lose their ASCII spaces and their case.
If the target is a substring of what was read, the score is 1; otherwise 1 - min(edit distance, target length) / target
length. Three consequences: more text beside the target costs nothing, lines in another order cost much, and "cat" is
found inside "concatenate". The column `exact` says whether the words of the target, and nothing else, were read.

The recogniser is not the original's (PaddleOCR 2.9): decisions on equal recognised lines are equal, but the lines may
differ.
"""

import re
import threading
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.packages import extras_named, not_installed
from diffalign.rewards.base import Metadata, Reward

Line = tuple[str, float]
"""Recognised text and its confidence in [0, 1]."""


def target_of(prompt: str) -> str | None:
    """Return the first text between straight double quotes that is not blank, in one line; None if there is none."""
    quoted = (" ".join(text.split()) for text in re.findall(r'"([^"]*)"', prompt))
    return next((text for text in quoted if text), None)


def _plain(text: str) -> str:
    return text.replace(" ", "").lower()


def edit_distance(a: str, b: str) -> int:
    """Return the Levenshtein distance: insertions, deletions and substitutions cost 1."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def similarity(target: str, lines: list[Line]) -> float:
    """Return Flow-GRPO's score in [0, 1]; lines with confidence 0 are left out, as there."""
    wanted = _plain(target)
    read = _plain("".join(text for text, confidence in lines if confidence > 0))
    if wanted in read:
        return 1.0
    return 1 - min(edit_distance(read, wanted), len(wanted)) / len(wanted)


def exact_match(target: str, lines: list[Line]) -> float:
    """Return 1 if what was read is the target and nothing else, ignoring spaces between words and case."""
    return float(_plain("".join(text for text, confidence in lines if confidence > 0)) == _plain(target))


class OCRReward(Reward):
    """OCR on rapidocr, whose weights are in its wheel.

    side: longer sides are reduced to this many pixels before text is detected. 512 reads text of 20 px in a 512 px
    image; a larger value finds smaller text and takes longer. threads: of the engine; 0: torch's number.
    """

    name = "ocr"
    columns = ("similarity", "exact")
    range = (0.0, 1.0)
    licence = "Apache-2.0 (rapidocr, PP-OCR weights)"
    weights = "in the rapidocr wheel (PP-OCR)"
    size = "31 MB, installed with rapidocr"
    requires = ("diffalign[ocr]",)
    source = "arXiv 2505.05470"
    version = "2"

    def __init__(self, side: int = 512, threads: int = 0) -> None:
        if side < 32:
            raise DiffalignError(f"reward ocr: side {side} is too small to read anything; at least 32")
        self.side, self.threads = side, threads
        self.reasons: list[str] = []
        self._engine: Any = None
        self._lock = threading.Lock()

    def options(self) -> dict[str, Any]:
        return {"side": self.side}

    def weights_id(self) -> str:
        from importlib.metadata import PackageNotFoundError, version

        try:
            return f"rapidocr {version('rapidocr')}"
        except PackageNotFoundError:
            raise not_installed("rapidocr", "reward ocr") from None

    def reason_not_scorable(self, prompt: str | None, metadata: Metadata) -> str:
        no_quotes = 'no text in straight double quotes in the prompt, as in: a sign that says "OPEN"'
        return super().reason_not_scorable(prompt, metadata) or ("" if target_of(prompt or "") else no_quotes)

    def _load(self) -> Any:
        with self._lock:
            if self._engine is None:
                with extras_named("reward ocr"):
                    from rapidocr import RapidOCR
                threads = self.threads or torch.get_num_threads()
                self._engine = RapidOCR(
                    params={
                        "Global.log_level": "error",
                        "Global.use_cls": False,  # generated text is hardly ever upside down, and the check costs time
                        "Global.max_side_len": max(self.side, 2000),
                        "Det.limit_type": "max",
                        "Det.limit_side_len": self.side,
                        "EngineConfig.onnxruntime.intra_op_num_threads": threads,
                        "EngineConfig.onnxruntime.inter_op_num_threads": 1,
                    }
                )
            return self._engine

    def read(self, image: Image.Image) -> list[Line]:
        """Return the lines of an image in the recogniser's reading order."""
        pixels = np.ascontiguousarray(np.asarray(image.convert("RGB"))[:, :, ::-1])  # it expects BGR
        found = self._load()(pixels)
        # If it finds no text, the fields are None, not empty.
        return list(zip(found.txts or (), map(float, found.scores or ()), strict=True))

    def measure(
        self, images: list[Image.Image], prompts: list[str], metadata: list[Metadata] | None = None
    ) -> dict[str, Tensor]:
        self.reasons = [self.reason_not_scorable(prompt, {}) for prompt in prompts]
        if all(self.reasons) and prompts:
            raise DiffalignError(f"reward ocr: prompt {prompts[0]!r}: {self.reasons[0]}")
        rows = torch.full((len(images), 2), float("nan"))
        for i, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
            target = target_of(prompt)
            if target is not None:
                lines = self.read(image)
                rows[i] = torch.tensor([similarity(target, lines), exact_match(target, lines)])
        return {name: rows[:, k] for k, name in enumerate(self.columns)}

    def free(self) -> None:
        self._engine = None
