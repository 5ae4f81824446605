"""Validation during training: images of prompts that are not trained on, their scores, and which weights were best.

    validation.jsonl          a row each time: {"step", "scores": {"reward.column": [mean of a prompt's images, ...]}}
    samples/step-00000100.png a grid of the first prompts at their first seeds
    best/                     the weights of the best validation, in diffusers' format, beside weights/

Nothing here touches what training reads: noise is keyed by (seed, prompt, image) alone, no gradient is taken, and the
average of the weights, if one is kept, is put in and taken out again bit for bit.
"""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffalign.draws import draw
from diffalign.errors import DiffalignError
from diffalign.files import read_json_lines
from diffalign.training.tracking import cut_rows

SHOWN_PROMPTS = 8
Row = dict[str, Any]


@dataclass(frozen=True)
class Validation:
    """What is drawn and what judges it. `encoded`: `Backbone.encode_guided` of the prompts, since training frees the text
    encoders; `prompts` carry `prompt` and `metadata`; the first column of the first reward decides what is best."""

    settings: Any
    prompts: Sequence[Any]
    encoded: dict[str, Tensor]
    rewards: dict[str, Any]
    side: int
    seed: int = 0

    def due(self, done: int, steps: int) -> bool:
        """At step 0 for the untrained model, then every so many steps and at the end."""
        return done % self.settings.every == 0 or done == steps

    def run(self, backbone: Any, run_dir: Path, done: int) -> Row:
        """Draw and score with the policy's weights as they are; writes the grid and returns the row (not yet written)."""
        cells = [(p, k) for p in range(len(self.prompts)) for k in range(self.settings.seeds)]
        images: list[Image.Image] = []
        training = backbone.trunk.training
        backbone.trunk.eval()
        with backbone.borrowed_vae(), backbone.role("policy"):
            for start in range(0, len(cells), self.settings.batch_size):
                batch = cells[start : start + self.settings.batch_size]
                rows = [p for p, _ in batch]
                images += backbone.sample_encoded(
                    {name: values[rows] for name, values in self.encoded.items()},
                    [int(draw(self.seed, "validation", inner=p, member=k).integers(2**32)) for p, k in batch],
                    steps=self.settings.steps,
                    guidance_scale=self.settings.guidance_scale,
                    height=self.side,
                    width=self.side,
                )
        backbone.trunk.train(training)
        self._save_grid(images, run_dir / "samples" / f"step-{done:08d}.png")
        return {"step": done, "scores": self._scores(images, cells)}

    def _scores(self, images: list[Image.Image], cells: list[tuple[int, int]]) -> dict[str, list[float | None]]:
        texts = [self.prompts[p].prompt for p, _ in cells]
        facts = [self.prompts[p].metadata for p, _ in cells]
        scores: dict[str, list[float | None]] = {}
        for name, reward in self.rewards.items():
            for column, values in reward.measure(images, texts, facts).items():
                by_prompt = values.view(len(self.prompts), self.settings.seeds).double().nanmean(dim=1).tolist()
                scores[f"{name}.{column}"] = [round(v, 6) if math.isfinite(v) else None for v in by_prompt]
        return scores

    def _save_grid(self, images: list[Image.Image], path: Path) -> None:
        shown = images[:: self.settings.seeds][:SHOWN_PROMPTS]
        grid = Image.new("RGB", (sum(i.width for i in shown), shown[0].height))
        for n, image in enumerate(shown):
            grid.paste(image, (n * shown[0].width, 0))
        path.parent.mkdir(parents=True, exist_ok=True)
        grid.save(path)


def score_of(row: Row) -> float:
    """The number that chooses: the mean over prompts of the first column."""
    column, values = next(iter(row["scores"].items()))
    known = [v for v in values if v is not None]
    if not known:
        raise DiffalignError(f"validation: no image could be scored by {column}; see the reward's needs")
    return sum(known) / len(known)


def best_of(rows: Sequence[Row]) -> tuple[int, int]:
    """Step of the best trained weights so far, the earliest among equals, and how many validations came after it."""
    trained = [row for row in rows if row["step"] > 0]
    if not trained:
        return 0, 0
    scores = [score_of(row) for row in trained]
    best = scores.index(max(scores))
    return int(trained[best]["step"]), len(trained) - 1 - best


class ValidationLog:
    """validation.jsonl, cut to what a resumed run has reached (nothing, where no step is done yet)."""

    def __init__(self, run_dir: Path, step: int, write: bool) -> None:
        self.path, self.write = run_dir / "validation.jsonl", write
        step = step or -1
        self.rows = read_json_lines(self.path, step)
        if write:
            cut_rows(self.path, step)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        if self.write:
            with self.path.open("a") as stream:
                stream.write(json.dumps(row) + "\n")


@contextmanager
def averaged(policy: dict[str, Any], ema: dict[str, Tensor] | None) -> Iterator[None]:
    """The averaged weights in the policy's place for the time of the block."""
    kept = {name: policy[name].detach().clone() for name in ema or {}}
    with torch.no_grad():
        for name, average in (ema or {}).items():
            policy[name].copy_(average)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in kept.items():
                policy[name].copy_(value)
