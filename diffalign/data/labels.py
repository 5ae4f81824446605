"""Make the labels of a dataset's groups from its preferences or from a reward's scores."""

import numpy as np
import torch

from diffalign.data.dataset import PreferenceDataset
from diffalign.data.dataset_card import shuffled_words
from diffalign.errors import DiffalignError
from diffalign.health import Finding, LabelledGroup
from diffalign.objectives.advantages import CLIP, EPSILON, standardised
from diffalign.rewards.aggregate import vote_shares

ADVANTAGES = ("advantage", "optimality")


def labels(
    dataset: PreferenceDataset,
    groups: list[int],
    source: str = "preference",
    transform: str = "none",
    stats: dict[str, float] | None = None,
    spread: str = "dataset",
) -> list[np.ndarray]:
    """Return one array [K] a group, in the order of its images; NaN where an image has no label.

    source: "preference", "scores.NAME" (a reward's first column) or "scores.NAME.COLUMN". transform: "none", "votes"
    (vote shares within the group), "balanced" (minus the group's mean, over its mean absolute deviation: MathForge's
    advantages, arXiv 2601.20614), "minmax" or "zscore" over the dataset, "advantage" or "optimality" (see `advantages`).
    stats: {"min", "max"}, {"mean", "std"} or {"std"} to use in place of those of this dataset, so that several runs can share
    a scale. spread: whose deviation an advantage is divided by, the dataset's or the group's.
    """
    raw = raw_labels(dataset, groups, source)
    return scaled(raw, transform, stats or statistics(raw, transform, spread))


def statistics(raw: list[np.ndarray], transform: str, spread: str = "dataset") -> dict[str, float]:
    """Return what a transform needs of the labels of all groups, else {}.

    minmax: {"min", "max"}; zscore: {"mean", "std"}; advantage and optimality with the spread of the dataset: {"std"}.
    Raises DiffalignError if no image has a label.
    """
    by_advantage = transform in ADVANTAGES and spread == "dataset"
    if transform not in ("minmax", "zscore") and not by_advantage:
        return {}
    known = np.concatenate(raw)
    known = known[np.isfinite(known)]
    if not known.size:
        raise DiffalignError(f"labels.transform={transform}: no image of the chosen groups has a label to scale")
    if transform == "minmax":
        return {"min": float(known.min()), "max": float(known.max())}
    if by_advantage:
        return {"std": float(known.std())}
    return {"mean": float(known.mean()), "std": float(known.std())}


def raw_labels(dataset: PreferenceDataset, groups: list[int], source: str) -> list[np.ndarray]:
    """Return the labels as they are stored, one array [K] a group; see `labels`."""
    ids = dataset.column("group_id")
    if source == "preference":
        preferences = dataset.column("preference")
        raw = []
        for i in groups:
            count = len(dataset.members(ids[i]))
            if len(preferences[i] or []) != count:
                raise DiffalignError(
                    f"group {ids[i]} of {dataset.folder} has {count} images and {len(preferences[i] or [])} preferences; "
                    "rank the dataset first, or set labels.source=scores.NAME"
                )
            raw.append(np.array(preferences[i], dtype=np.float64))
    else:
        _, reward, *column = source.split(".")
        scores = dataset.scores(reward, column[0] if column else None)
        raw = [np.array([scores.get((ids[i], m), float("nan")) for m in dataset.members(ids[i])]) for i in groups]
    return raw


def scaled(raw: list[np.ndarray], transform: str, stats: dict[str, float]) -> list[np.ndarray]:
    """Return the labels after a transform; `stats` are those of `statistics`."""
    if transform == "none":
        return raw
    if transform == "votes":
        return [vote_shares(r[None]) for r in raw]
    if transform == "balanced":
        return [balanced(r) for r in raw]
    if transform in ADVANTAGES:
        found = advantages(raw, stats.get("std"))
        return found if transform == "advantage" else [np.clip(a / (2 * CLIP) + 0.5, 0.0, 1.0) for a in found]
    if transform == "minmax":
        return [(r - stats["min"]) / max(stats["max"] - stats["min"], 1e-12) for r in raw]
    return [(r - stats["mean"]) / max(stats["std"], 1e-12) for r in raw]


def advantages(raw: list[np.ndarray], std: float | None) -> list[np.ndarray]:
    """Return (r - mean of its group) / (deviation + 1e-4), clipped at 5, one array [K] a group; NaN stays NaN.

    std: the deviation over all images of the data, as DiffusionNFT and AWM take it over an epoch; None: each group's own. A
    group whose known labels are all equal gets exactly 0. `optimality` is A / 10 + 1/2 of the same, in [0, 1].
    """
    padded = torch.full((len(raw), max(len(r) for r in raw)), torch.nan, dtype=torch.float64)
    for row, values in enumerate(raw):
        padded[row, : len(values)] = torch.from_numpy(values)
    found = standardised(padded, spread="none") / (std + EPSILON) if std is not None else standardised(padded)
    found = found.clamp(-CLIP, CLIP).masked_fill(~padded.isfinite(), torch.nan)
    return [row[: len(values)].numpy() for row, values in zip(found, raw, strict=True)]


def balanced(values: np.ndarray) -> np.ndarray:
    """Return (r - mean) / mean |r - mean| of one group, [K]: absolute values sum to K; 0 without spread."""
    known = values[np.isfinite(values)]
    centre = known.mean() if known.size else 0.0
    deviation = np.abs(known - centre).mean() if known.size else 0.0
    return np.asarray((values - centre) / (deviation if deviation > 0 else 1.0))


def shuffled_labels(dataset: PreferenceDataset) -> list[Finding]:
    """Return a finding if the preferences of this dataset were shuffled as a control, else none."""
    done = dataset.ranking()
    if done is None or not done["settings"]["shuffle"]:
        return []
    return [Finding("labels_shuffled", 0, shuffled_words(done["settings"]))]


def labelled_groups(dataset: PreferenceDataset, groups: list[int], values: list[np.ndarray]) -> list[LabelledGroup]:
    """Return the labels `values` of groups with every stored score and the generators' names, for `examine_labels`."""
    ids = dataset.column("group_id")
    stored = {reward: dataset.scores(reward) for reward in dataset.rewards()}
    made_by = dataset.generators()
    found = []
    for i, value in zip(groups, values, strict=True):
        members = dataset.members(ids[i])
        scores = {r: [s.get((ids[i], m), float("nan")) for m in members] for r, s in stored.items()}
        found.append(LabelledGroup(value.tolist(), scores, [made_by.get((ids[i], m), "") for m in members]))
    return found
