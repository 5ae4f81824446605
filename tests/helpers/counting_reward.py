"""A reward that remembers what it was shown, and `diffalign score`'s run with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image

from diffalign.rewards import Reward
from diffalign.scoring.run import score_items
from diffalign.scoring.sources import collect
from diffalign.scoring.store import Store


class Counting(Reward):
    """Scores the mean brightness, and remembers what it was shown."""

    name = "counting"
    columns = ("brightness", "width")
    range = (0.0, 255.0)
    licence = weights = "none"
    reads: ClassVar[tuple[str, ...]] = ("prompt",)

    def __init__(self, stop_after: int | None = None) -> None:
        self.seen: list[str] = []
        self.batches: list[int] = []
        self.stop_after = stop_after
        self.reasons = []

    def measure(self, images: list[Image.Image], prompts: list[str], metadata: Any = None) -> dict[str, torch.Tensor]:
        if self.stop_after is not None and len(self.batches) == self.stop_after:
            raise KeyboardInterrupt
        self.seen += prompts
        self.batches.append(len(images))
        self.reasons = ["" if "odd" not in p else "odd prompt" for p in prompts]
        mean = [sum(i.convert("L").getdata()) / (i.width * i.height) for i in images]
        nan = float("nan")
        return {
            "brightness": torch.tensor([nan if r else m for m, r in zip(mean, self.reasons, strict=True)]),
            "width": torch.tensor([nan if r else float(i.width) for i, r in zip(images, self.reasons, strict=True)]),
        }


def run(paths: list[Path], output: Path | None, reward: Reward | None = None, **options: Any) -> tuple[Any, Counting]:
    counting = reward or Counting()
    with Store(output) as store:
        items = collect([str(p) for p in paths], options.pop("prompting", None))
        scores = score_items(items, {"counting": counting}, store, batch_size=4, **options)
        store.finish(scores.rows, [p.as_posix() for p in paths])
    assert isinstance(counting, Counting)
    return scores, counting
