"""The online loop (`train.online`): before every n-th update the old policy draws images, which are scored and trained on.

    online.jsonl                a row a draw: {"step", "epoch", "scores": {"reward.column": [mean of a prompt's images, ...]},
                                "unscored": {reward: images}, "tied": groups whose labels are all equal}
    samples/drawn-00000100.png  a grid of the first prompts' images

Prompts, seeds and batches of a draw follow from seed and epoch alone, and the old policy from the checkpoint, so a resumed
run draws what the killed one drew. Several processes draw and score whole batches each.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image

from diffalign.config import TrainConfig
from diffalign.data.combine import transformed_labels
from diffalign.data.plan import chunks
from diffalign.data.score import Asked, score_asked
from diffalign.draws import draw
from diffalign.errors import DiffalignError
from diffalign.training.average import move_average
from diffalign.training.average_decay import old_decay
from diffalign.training.checkpoint import TrainState
from diffalign.training.drawing import drawing, own_random_numbers, save_grid
from diffalign.training.preference.drawn_groups import DrawnGroups
from diffalign.training.preference.samplers import Sampler
from diffalign.training.protocols import Say
from diffalign.training.tracking import cut_rows

if TYPE_CHECKING:
    from diffalign.pipelines import Backbone
    from diffalign.rewards import Reward

SHOWN_PROMPTS, SHOWN_IMAGES, GRIDS = 4, 8, 24
Cell = tuple[int, int]
"""An image: its group, and its number among the group's images."""
Scores = dict[str, np.ndarray]
""""reward.column" -> scores [P, K], NaN where an image could not be scored."""


@dataclass(frozen=True)
class Held:
    """A drawn image in memory, as `score_asked` takes it."""

    group_id: str
    index: int
    image: Image.Image

    def decode(self) -> Image.Image:
        """Return the image."""
        return self.image


class Online:
    """Draws, scores and labels images for a run, and moves the old policy."""

    def __init__(
        self,
        config: TrainConfig,
        backbone: Backbone,
        groups: DrawnGroups,
        rewards: Mapping[str, Reward],
        sampler: Sampler,
        accelerator: Accelerator,
        say: Say,
    ) -> None:
        """Prepare; nothing is drawn before the first step. rewards: by label, those of `train.online.rewards`."""
        assert config.train.online is not None
        self.config, self.online, self.backbone, self.groups = config, config.train.online, backbone, groups
        self.rewards, self.sampler, self.accelerator, self.say = rewards, sampler, accelerator, say
        self.decay = old_decay(self.online.old)
        self.role = "reference" if config.tune.reference == "old" else "policy"
        self.path = Path(config.run_dir) / "online.jsonl"
        # Rewards that have scored an image: what fails from then on is that image's fault.
        self._proven: set[str] = set()

    def begin(self, step: int, state: TrainState) -> None:
        """Before update `step`, counted from 0: move the old policy and draw, if it is time."""
        if step % self.online.every:
            return
        if step and self.role == "reference" and state.reference is not None:
            move_average(state.reference, state.policy, self.decay.at(step))
        self._draw(step // self.online.every, step)

    def row(self) -> dict[str, float]:
        """Return what metrics.jsonl says of the draw that the last step trained on."""
        reward, unscored = self.groups.facts.tolist()
        return {"epoch": float(self.groups.epoch + 1), "reward": reward, "unscored": unscored}

    def _draw(self, epoch: int, step: int) -> None:
        groups, process = self.groups, self.accelerator.process_index
        groups.begin(epoch)
        members = range(self.online.images_per_prompt)
        cells = [(group, member) for group in range(len(groups)) for member in members]
        scores = {
            f"{label}.{column}": np.zeros((len(groups), len(members)))
            for label, reward in self.rewards.items()
            for column in reward.columns
        }
        reasons: Counter[tuple[str, str]] = Counter()

        # ---- Draw and score: whole batches, which are the same whatever the processes ----
        with drawing(self.backbone, self.role):
            for number, batch in enumerate(chunks(cells, self.online.batch_size)):
                if number % self.accelerator.num_processes == process:
                    images = self._drawn(batch, number)
                    self._score(batch, images, scores, reasons)
            self._share(scores)
            counts: Counter[tuple[str, str]] = sum(gather_object([reasons]), Counter())
            if self.accelerator.is_main_process and self._shows(epoch):
                self._save_grid(step)

        # ---- Labels: over the whole draw ----
        self._label(scores, counts)
        if self.accelerator.is_main_process:
            self._report(epoch, step, scores, counts)

    def _drawn(self, batch: list[Cell], number: int) -> list[Image.Image]:
        """Draw a batch; keep what the sampler keeps of each image, and return the images."""
        groups = self.groups
        rows, names = groups.rows, groups.group_ids
        conditioning = groups.embeddings.batch([rows[group].prompt for group, _ in batch])
        seeds = [groups.image_seed(names[group], member) for group, member in batch]
        own = int(draw(self.config.seed, "online", step=groups.epoch, inner=number).integers(2**32))
        with own_random_numbers(self.backbone, own), torch.no_grad():
            found = self.sampler(conditioning, seeds)
            images = self.backbone.to_images(self.backbone.decode_latents(found["latents"]))
        at = tuple(torch.tensor(places) for places in zip(*batch, strict=True))
        for name, values in found.items():
            groups.values[name][at] = values.cpu().to(groups.values[name].dtype)
        return images

    def _score(
        self, batch: list[Cell], images: list[Image.Image], scores: Scores, reasons: Counter[tuple[str, str]]
    ) -> None:
        """Score a batch's images with every reward; an image that cannot be scored gets NaN."""
        rows, names = self.groups.rows, self.groups.group_ids
        asked = [
            Asked(Held(names[group], member, image), rows[group].prompt, rows[group].metadata)
            for (group, member), image in zip(batch, images, strict=True)
        ]
        for label, reward in self.rewards.items():
            for cell, found in zip(batch, score_asked(asked, reward, label in self._proven), strict=True):
                for column in reward.columns:
                    scores[f"{label}.{column}"][cell] = found[column]
                if math.isfinite(found[reward.columns[0]]):
                    self._proven.add(label)
                else:
                    reasons[label, found["reason"]] += 1

    def _share(self, scores: Scores) -> None:
        """Exchange what the processes have drawn and scored; each has zeros where another has numbers."""
        if self.accelerator.num_processes == 1:
            return
        device = self.accelerator.device
        for values in self.groups.values.values():
            values.copy_(self.accelerator.reduce(values.to(device), reduction="sum"))
        for name, found in scores.items():
            scores[name] = self.accelerator.reduce(torch.from_numpy(found).to(device), reduction="sum").cpu().numpy()

    def _label(self, scores: Scores, reasons: Counter[tuple[str, str]]) -> None:
        """Turn scores into the labels of the draw, and note their mean. Raises DiffalignError where no image has a score."""
        label = self.config.labels

        def read(source: str) -> list[np.ndarray]:
            return list(scores[self._column(source)])

        weights = {f"scores.{k}": w for k, w in label.combine.weights.items()} if label.combine else {label.source: 1.0}
        for source in weights:
            if not np.isfinite(scores[self._column(source)]).any():
                name = source.split(".")[1]
                why = next((reason for (reward, reason), _ in reasons.most_common() if reward == name and reason), "")
                raise DiffalignError(
                    f"draw {self.groups.epoch + 1}: {name} scored no image ({why or 'its scores are not finite'}), so there is "
                    "nothing to learn; mend the reward, then run the same command again"
                )
        labels, _ = transformed_labels(read, label)
        self.groups.rewards.copy_(torch.from_numpy(np.stack(labels)))
        reward = sum(weight * _mean(scores[self._column(source)]) for source, weight in weights.items())
        unscored = 1.0 - float(self.groups.rewards.isfinite().double().mean())
        self.groups.facts.copy_(torch.tensor([reward, unscored], dtype=torch.float64))

    def _column(self, source: str) -> str:
        """Return the key of `scores` for a source such as scores.NAME or scores.NAME.COLUMN."""
        _, label, *column = source.split(".")
        return f"{label}.{column[0] if column else self.rewards[label].columns[0]}"

    # --- what people see -----------------------------------------------------------------------------------------

    def _shows(self, epoch: int) -> bool:
        """Return whether a grid of this draw is kept: of so many that a report can show them."""
        epochs = -(-self.config.train.steps // self.online.every)
        return epoch % -(-epochs // GRIDS) == 0 or epoch == epochs - 1

    def _save_grid(self, step: int) -> None:
        latents = self.groups.values["latents"][:SHOWN_PROMPTS, :SHOWN_IMAGES]
        with torch.no_grad():
            rows = [self.backbone.to_images(self.backbone.decode_latents(row)) for row in latents]
        save_grid(rows, Path(self.config.run_dir) / "samples" / f"drawn-{step:08d}.png")

    def _report(self, epoch: int, step: int, scores: Scores, reasons: Counter[tuple[str, str]]) -> None:
        """Add a row to online.jsonl, and say how many images could not be scored."""
        unscored: Counter[str] = Counter()
        for (label, reason), count in reasons.most_common():
            unscored[label] += count
            self.say(f"draw {epoch + 1}: {label} did not score {count} images: {reason or 'not finite'}")
        labels = self.groups.rewards
        high, low = labels.nan_to_num(-math.inf).amax(1), labels.nan_to_num(math.inf).amin(1)
        row: dict[str, Any] = {
            "step": step,
            "epoch": epoch + 1,
            "scores": {name: [_rounded(_mean(row)) for row in values] for name, values in scores.items()},
            "unscored": dict(unscored),
            "tied": int((high <= low).sum()),
        }
        # A run that was killed during or after this draw has its row already.
        cut_rows(self.path, step - 1)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")


def _mean(values: np.ndarray) -> float:
    """Return the mean of the finite values; NaN of none."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else math.nan


def _rounded(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None
