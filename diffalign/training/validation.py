"""Validation during training: images of prompts that are not trained on, their scores, and which weights were best.

    validation.jsonl          a row each time: {"step", "scores": {"reward.column": [mean of a prompt's images, ...]}}
    samples/step-00000100.png a grid of the first prompts at their first seeds
    best/                     the weights of the best validation, in diffusers' format, beside weights/

Nothing here touches what training reads: noise is keyed by (seed, prompt, image) alone, no gradient is taken, and the
average of the weights, if one is kept, is put in and taken out again bit for bit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from PIL import Image
from torch import Tensor

from diffalign.draws import draw
from diffalign.errors import DiffalignError
from diffalign.files import read_json_lines
from diffalign.training.alone import Alone
from diffalign.training.drawing import drawing, own_random_numbers, save_grid
from diffalign.training.protocols import Say
from diffalign.training.protocols import ValidationRow as Row
from diffalign.training.tracking import cut_rows

if TYPE_CHECKING:
    from diffalign.config import ValidationSection
    from diffalign.data.prompts import PromptRow
    from diffalign.pipelines import Backbone
    from diffalign.pipelines.settings import SamplingSettings
    from diffalign.rewards import Reward
    from diffalign.training.health import HealthMonitor

SHOWN_PROMPTS = 8


@dataclass(frozen=True)
class Validation:
    """The model that draws validation images, their prompts, and the rewards that judge them.

    encoded: `Backbone.encode_guided` of the prompts, since training frees the text encoders; sampling: how images are drawn.
    The first column of the first reward decides which weights are best.
    """

    backbone: Backbone
    settings: ValidationSection
    prompts: Sequence[PromptRow]
    encoded: dict[str, Tensor]
    rewards: dict[str, Reward]
    sampling: SamplingSettings
    seed: int = 0

    def run(self, run_dir: Path, done: int) -> Row:
        """Draw and score with the policy's weights as they are; write the grid and return the row (not yet written)."""
        with own_random_numbers(self.backbone, self.seed):
            cells = [(p, k) for p in range(len(self.prompts)) for k in range(self.settings.seeds)]
            images = self._draw(cells)
            shown = images[:: self.settings.seeds][:SHOWN_PROMPTS]
            save_grid([shown], run_dir / "samples" / f"step-{done:08d}.png")
            return {"step": done, "scores": self._scores(images, cells)}

    def _draw(self, cells: list[tuple[int, int]]) -> list[Image.Image]:
        """Draw images of (prompt, number among its images)."""
        backbone, settings = self.backbone, self.settings
        images: list[Image.Image] = []
        with drawing(backbone, "policy"):
            for start in range(0, len(cells), settings.batch_size):
                batch = cells[start : start + settings.batch_size]
                rows = [p for p, _ in batch]
                images += backbone.sample_encoded(
                    {name: values[rows] for name, values in self.encoded.items()},
                    [int(draw(self.seed, "validation", inner=p, member=k).integers(2**32)) for p, k in batch],
                    self.sampling,
                )
        return images

    def _scores(self, images: list[Image.Image], cells: list[tuple[int, int]]) -> dict[str, list[float | None]]:
        texts = [self.prompts[p].prompt for p, _ in cells]
        facts = [self.prompts[p].metadata for p, _ in cells]
        scores: dict[str, list[float | None]] = {}
        for name, reward in self.rewards.items():
            for column, values in reward.measure(images, texts, facts).items():
                by_prompt = values.view(len(self.prompts), self.settings.seeds).double().nanmean(dim=1).tolist()
                scores[f"{name}.{column}"] = [round(v, 6) if math.isfinite(v) else None for v in by_prompt]
        return scores


def score_of(row: Row) -> float:
    """Return the number that decides which weights are best: the mean over prompts of the first column.

    Raises DiffalignError where no image could be scored.
    """
    column, values = next(iter(row["scores"].items()))
    known = [v for v in values if v is not None]
    if not known:
        raise DiffalignError(f"validation: no image could be scored by {column}; see the reward's needs")
    return sum(known) / len(known)


def best_of(rows: Sequence[Row]) -> tuple[int, int]:
    """Return the step of the best trained weights so far, the earliest among equals, and how many validations came after it."""
    trained = [row for row in rows if row["step"] > 0]
    if not trained:
        return 0, 0
    scores = [score_of(row) for row in trained]
    best = scores.index(max(scores))
    return int(trained[best]["step"]), len(trained) - 1 - best


class Validations:
    """The validations of a run, in validation.jsonl: cut to what a resumed run has reached (nothing before its first step)."""

    def __init__(
        self,
        validation: Validation,
        run_dir: Path,
        first: int,
        accelerator: Accelerator,
        alone: Alone,
        health: HealthMonitor | None,
        say: Say,
    ) -> None:
        self.validation, self.run_dir = validation, run_dir
        self.accelerator, self.alone, self.health, self.say = accelerator, alone, health, say
        self.path, step = run_dir / "validation.jsonl", first or -1
        self.rows: list[Row] = read_json_lines(self.path, step)
        if accelerator.is_main_process:
            cut_rows(self.path, step)

    def due(self, done: int, steps: int) -> bool:
        """Return whether to validate after `done` of `steps` steps: every `every` steps, and at the end."""
        every = self.validation.settings.every
        return every is not None and (done % every == 0 or done == steps)

    def lacks(self, done: int, steps: int) -> bool:
        """Return whether a validation was due after `done` steps and has no row."""
        return done > 0 and self.due(done, steps) and all(row["step"] != done for row in self.rows)

    def run(self, done: int) -> dict[str, float]:
        """Validate the weights as they are after `done` steps; return the mean score by name, for trackers.

        The main process draws and scores; all learn the outcome, since it may end the run.
        """
        main = self.accelerator.is_main_process
        with self.alone.main_alone():
            message: list[Any] = [self.validation.run(self.run_dir, done) if main else None]
        row: Row = broadcast_object_list(message)[0]
        self.rows.append(row)
        if main:
            with self.path.open("a") as stream:
                stream.write(json.dumps(row) + "\n")
        if self.health:
            self.health.validation(row)
        column = next(iter(row["scores"]))
        if main:
            self.say(f"validation at step {done}: {column} {score_of(row):.4f}")
        return {f"validation/{column}": score_of(row)}

    @property
    def best(self) -> int:
        """Step of the best trained weights so far, 0 before there are any."""
        return best_of(self.rows)[0]

    @property
    def idle(self) -> int:
        """How many validations came after the best one."""
        return best_of(self.rows)[1]

    @property
    def exhausted(self) -> bool:
        """Whether the run's patience is used up by validations in a row that were no better."""
        patience = self.validation.settings.patience
        return patience is not None and self.idle >= patience

    def why_stopped(self, step: int) -> str:
        """Return the message of a run that ended at `step` because its patience was used up."""
        return f"no better validation in {self.idle} of them: stopped at step {step}; best/ is step {self.best}"
