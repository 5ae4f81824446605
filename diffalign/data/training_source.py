"""Prepare what training reads: latents, prompt embeddings and labels, by group."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffalign.data.buckets import describe
from diffalign.data.cache import CachePlan, plan_cache
from diffalign.data.combine import transformed_labels
from diffalign.data.dataset import PreferenceDataset
from diffalign.data.embeddings import LivePrompts, PromptStore
from diffalign.data.labels import labelled_groups, raw_labels
from diffalign.data.latents import LatentStore, LiveLatents
from diffalign.data.protocols import Encoder, GroupSettings, LabelSettings
from diffalign.data.tracked_noise import tracked_seeds
from diffalign.errors import DiffalignError
from diffalign.health import LabelledGroup
from diffalign.pipelines.paths import Paths
from diffalign.progress import Say


@dataclass(frozen=True)
class Batch:
    """B groups of K images.

    latents: [B, K, C, h, w] float32. conditioning: each [B, ...]. rewards: [B, K] float32, NaN without a label. mask:
    bool [B], False for a group with fewer than two images. spread: the standard deviation of the latents' posterior, of
    their shape, if `data.latent_sampling` is posterior. seeds: [B, K] int64, of the noise that made each image, if that is
    used; -1 where there is no image. paths: of the sampler that drew the images, if they are learnt from.
    """

    latents: Tensor
    conditioning: dict[str, Tensor]
    rewards: Tensor
    mask: Tensor
    group_ids: list[str]
    prompts: list[str]
    spread: Tensor | None = None
    seeds: Tensor | None = None
    paths: Paths | None = None


@dataclass(frozen=True)
class TrainingSource:
    """Groups to train on, all with K image slots; a slot without a label is no image of its group.

    label_stats: what labels.transform took from the labels, or was given. buckets: a number for each group; only groups
    with equal numbers have one shape and may share a batch. plan: the cache that it reads. seeds: [G, K], as in `Batch`.
    condition: under which name the trunk takes the latents of condition images, if there are any.
    """

    latents: LatentStore | LiveLatents
    embeddings: PromptStore | LivePrompts
    rewards: Tensor
    mask: Tensor
    group_ids: list[str]
    prompts: list[str]
    label_stats: dict[str, float] = field(default_factory=dict)
    buckets: list[int] = field(default_factory=list)
    plan: CachePlan | None = None
    seeds: Tensor | None = None
    condition: str | None = None

    def __len__(self) -> int:
        return len(self.group_ids)

    @property
    def unconditional(self) -> dict[str, Tensor]:
        """The embeddings of the empty prompt, each [1, ...]."""
        return self.embeddings.unconditional

    def batch(self, indices: list[int]) -> Batch:
        """Return the groups at these positions, in this order."""
        latents, spread = self.latents.batch(indices)
        prompts = [self.prompts[i] for i in indices]
        conditioning = self.embeddings.batch(prompts)
        if self.condition is not None:
            conditioning[self.condition] = self.latents.conditions(indices)
        return Batch(
            latents,
            conditioning,
            self.rewards[indices],
            self.mask[indices],
            [self.group_ids[i] for i in indices],
            prompts,
            spread,
            None if self.seeds is None else self.seeds[indices],
        )

    def content(self) -> str:
        """Return a hash of what decides latents and embeddings, and of the seeds if they are used.

        The first are images, captions, sizes and the model's weights.
        """
        parts = [self.plan.latent_folder.name, self.plan.prompt_folder.name] if self.plan else []
        if self.seeds is not None:
            parts.append(hashlib.blake2b(self.seeds.numpy().tobytes(), digest_size=12).hexdigest())
        return " ".join(parts)

    def labelled(self, dataset: PreferenceDataset) -> list[LabelledGroup]:
        """Return the labels with stored scores and generators, to check the labels before training on them."""
        position = {group: i for i, group in enumerate(dataset.column("group_id"))}
        rows = [position[group] for group in self.group_ids]
        sizes = [len(dataset.members(group)) for group in self.group_ids]
        values = [row[:size].double().numpy() for row, size in zip(self.rewards, sizes, strict=True)]
        return labelled_groups(dataset, rows, values)


def choose_groups(data: GroupSettings, dataset: PreferenceDataset) -> tuple[list[int], int, int]:
    """Return the row numbers of the split's groups (up to `limit`), K of the largest group, and how many are smaller.

    Raises DiffalignError if no group has two images, or `group_size` exceeds K.
    """
    chosen = dataset.split(data.split)[: data.limit]
    ids = dataset.column("group_id")
    sizes = [len(dataset.members(ids[i])) for i in chosen]
    members = max(sizes)
    if members < 2:
        raise DiffalignError(
            f"{dataset.folder}: every group of split {data.split!r} has {members} image; a preference needs at least two "
            "(images_per_prompt in `diffalign sample`)"
        )
    if data.group_size is not None and data.group_size > members:
        raise DiffalignError(
            f"data.group_size={data.group_size}: the largest group of split {data.split!r} in {dataset.folder} has "
            f"{members} images; use at most as many, or null for all"
        )
    return chosen, members, sum(s < members for s in sizes)


def check_guidance(data: GroupSettings, dataset: PreferenceDataset, backbone: Encoder) -> None:
    """Refuse a guidance embedding other than the one with which this model's images of the split were drawn.

    A model that takes the guidance scale as an input is another model at another scale. Images of another origin are
    not checked.
    """
    if backbone.guidance is None:
        return
    ids = dataset.column("group_id")
    chosen = {ids[i] for i in dataset.split(data.split)[: data.limit]}
    model = Path(backbone.path).name
    drawn = {
        float(origin["guidance_scale"])
        for group, origin in dataset.provenance()
        if group in chosen and "guidance_scale" in origin and Path(origin.get("model", "")).name == model
    }
    if drawn - {backbone.guidance}:
        scales = ", ".join(f"{scale:g}" for scale in sorted(drawn))
        remedy = f"set model.options.guidance={scales}" if len(drawn) == 1 else "train on those of one scale"
        raise DiffalignError(
            f"model.options.guidance={backbone.guidance:g}: the images in {dataset.folder} were drawn with guidance_scale="
            f"{scales}; {remedy}"
        )


@dataclass(frozen=True)
class ChosenLabels:
    """The groups that a run trains on and their labels, before anything is encoded.

    rows: numbers in groups.parquet; members: K of the largest group, smaller: how many have fewer. rewards [G, K], NaN where
    there is none; mask [G]: groups of two images or more. stats: the scale of the labels.
    """

    rows: list[int]
    members: int
    smaller: int
    rewards: Tensor
    mask: Tensor
    stats: dict[str, float]


def choose_labels(data: GroupSettings, label: LabelSettings, dataset: PreferenceDataset) -> ChosenLabels:
    """Read the labels of the groups that `data` chooses: a config's `data` and `labels` sections.

    Raises DiffalignError as `choose_groups`, and for labels that are not in the dataset.
    """
    chosen, members, smaller = choose_groups(data, dataset)
    # From stored preferences or scores, scaled over the chosen groups unless a scale is given.
    values, stats = transformed_labels(lambda source: raw_labels(dataset, chosen, source), label)
    rewards = np.full((len(chosen), members), np.nan, dtype=np.float32)
    for row, value in enumerate(values):
        rewards[row, : len(value)] = value
    mask = torch.tensor([len(v) >= 2 for v in values])
    return ChosenLabels(chosen, members, smaller, torch.from_numpy(rewards), mask, stats)


def prepare_source(
    data: GroupSettings,
    label: LabelSettings,
    dataset: PreferenceDataset,
    backbone: Encoder,
    say: Say = print,
    labels: ChosenLabels | None = None,
    tracked: bool = False,
) -> TrainingSource:
    """Encode what is not cached yet and join it with the labels.

    data, label: a config's `data` and `labels` sections. labels: what `choose_labels` returned, where it was asked before.
    tracked: also the seeds of the noise that made the images. Raises DiffalignError where that is not known.
    """
    labels = labels or choose_labels(data, label, dataset)
    chosen, members = labels.rows, labels.members
    if labels.smaller:
        say(
            f"{labels.smaller} of {len(chosen)} groups have fewer than {members} images and are trained on with those they "
            "have"
        )
    # Latents and embeddings: refused before anything is encoded if the cache does not fit on the disk.
    ids = dataset.column("group_id")
    plan = plan_cache(data, dataset, chosen, members, backbone)
    sizes = sorted(set(plan.frames.sizes))
    if len(sizes) > 1:
        say(f"groups by size: {', '.join(f'{n} of {size}' for size, n in describe(plan.frames.sizes).items())}")
    seeds = None
    if tracked:
        side, channels = backbone.vae_scale_factor, backbone.latent_channels
        shapes = [(channels, height // side, width // side) for width, height in plan.frames.sizes]
        seeds = tracked_seeds(dataset, chosen, members, backbone.family, shapes)
    plan.check_space()
    return TrainingSource(
        plan.latents(say),
        plan.embeddings(say),
        labels.rewards,
        labels.mask,
        [ids[i] for i in chosen],
        plan.prompts,
        labels.stats,
        [sizes.index(size) for size in plan.frames.sizes],
        plan,
        seeds,
        backbone.condition if plan.frames.conditions else None,
    )
