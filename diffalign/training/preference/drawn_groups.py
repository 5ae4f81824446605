"""The groups that a run draws itself (`train.online`), in the form in which `TrainingSource` gives those of a dataset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from diffalign.config import OnlineSection
from diffalign.data.embeddings import LivePrompts, PromptStore
from diffalign.data.plan import image_seed
from diffalign.data.prompts import PromptRow
from diffalign.data.training_source import Batch
from diffalign.pipelines.paths import Paths, PathSteps
from diffalign.training.order import groups_for_step
from diffalign.training.protocols import Conditioning, Weights

Shape = tuple[int, ...]


class DrawnGroups:
    """P groups of K images of the last draw; each draw takes their place.

    values: what was drawn, [P, K, ...] each: "latents" [P, K, C, h, w] float32 as the sampler made them, and what else it
    keeps of each image. rewards [P, K]: the labels, NaN where an image could not be scored. epoch: of the draw, from 0. Prompts
    and seeds follow from seed and epoch alone.
    """

    def __init__(
        self,
        prompts: Sequence[PromptRow],
        embeddings: PromptStore | LivePrompts,
        online: OnlineSection,
        seed: int,
        shapes: Mapping[str, Shape],
        tracked: bool = False,
        steps: PathSteps | None = None,
    ) -> None:
        """Make room for a draw.

        shapes: of `values` for one image. tracked: give the images' seeds with the batches. steps: give their paths, "path" of
        `values`, which these steps made.
        """
        self.steps = steps
        self.prompts, self.embeddings, self.online, self.seed, self.tracked = prompts, embeddings, online, seed, tracked
        size = (online.groups, online.images_per_prompt)
        self.values = {name: torch.zeros(*size, *shape) for name, shape in shapes.items()}
        self.rewards = torch.full(size, torch.nan)
        self.mask = torch.ones(online.groups, dtype=torch.bool)
        self.buckets = [0] * online.groups
        self.facts = torch.zeros(2, dtype=torch.float64)
        """The mean reward of the draw, and the share of images without a score."""
        self._epoch = torch.tensor(-1)
        self._places: tuple[int, list[int]] = (-1, [])

    def begin(self, epoch: int) -> None:
        """Begin the draw of an epoch: nothing is known of its images yet."""
        self._epoch.fill_(epoch)
        for values in self.values.values():
            values.zero_()

    @property
    def epoch(self) -> int:
        """The number of the draw, from 0; -1 before the first."""
        return int(self._epoch)

    @property
    def rows(self) -> list[PromptRow]:
        """The prompt of each group."""
        if self._places[0] != self.epoch:
            online = self.online
            found = groups_for_step(len(self.prompts), online.groups, self.epoch, self.seed, "online")
            self._places = (self.epoch, found)
        return [self.prompts[place] for place in self._places[1]]

    @property
    def group_ids(self) -> list[str]:
        """A name for each group, which no other draw has: a prompt may come up twice in one."""
        return [f"{self.epoch:06d}-{slot:05d}-{row.prompt_id}" for slot, row in enumerate(self.rows)]

    def image_seed(self, group_id: str, member: int) -> int:
        """Return the seed of an image's noise, below 2^32."""
        return image_seed(self.seed, group_id, member)

    @property
    def unconditional(self) -> Conditioning:
        """The embeddings of the empty prompt, [1, ...] each."""
        return self.embeddings.unconditional

    def __len__(self) -> int:
        return self.online.groups

    def batch(self, indices: list[int]) -> Batch:
        """Return the groups at these positions, in this order."""
        rows, names = self.rows, self.group_ids
        prompts = [rows[i].prompt for i in indices]
        seeds = None
        if self.tracked:
            members = range(self.online.images_per_prompt)
            seeds = torch.tensor([[self.image_seed(names[i], k) for k in members] for i in indices])
        return Batch(
            self.values["latents"][indices],
            self.embeddings.batch(prompts),
            self.rewards[indices],
            self.mask[indices],
            [names[i] for i in indices],
            prompts,
            seeds=seeds,
            paths=Paths(self.values["path"][indices], self.steps) if self.steps else None,
        )

    def content(self) -> str:
        """Return nothing: no later run meets these images."""
        return ""

    def kept(self, step: int) -> Weights:
        """Return what a checkpoint after `step` steps must hold; nothing where the next step draws anew."""
        if step % self.online.every == 0:
            return {}
        return {**self.values, "labels": self.rewards, "facts": self.facts, "epoch": self._epoch}
