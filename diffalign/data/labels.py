"""Labels of a dataset's groups, from its preferences or from a reward's scores."""

from typing import Any

import numpy as np

from diffalign.data.dataset import PreferenceDataset
from diffalign.errors import DiffalignError
from diffalign.rewards.aggregate import vote_shares


def labels(
    dataset: PreferenceDataset,
    groups: list[int],
    source: str = "preference",
    transform: str = "none",
    stats: dict[str, float] | None = None,
) -> list[np.ndarray]:
    """One array [K] a group, in the order of its images; NaN where an image has no label.

    source: "preference", "scores.NAME" (a reward's first column) or "scores.NAME.COLUMN". transform: "none", "votes"
    (vote shares within the group), "minmax" or "zscore" over the dataset; `stats` replaces what these two would compute
    ({"min", "max"} or {"mean", "std"}), so that several runs can share a scale.
    """
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
    return _transformed(raw, transform, stats)


def _transformed(raw: list[np.ndarray], transform: str, stats: Any) -> list[np.ndarray]:
    if transform == "none":
        return raw
    if transform == "votes":
        return [np.where(np.isfinite(r), vote_shares(r[None]), float("nan")) for r in raw]
    known = np.concatenate(raw)
    known = known[np.isfinite(known)]
    if transform == "minmax":
        low, high = (stats["min"], stats["max"]) if stats else (known.min(), known.max())
        return [(r - low) / max(high - low, 1e-12) for r in raw]
    mean, std = (stats["mean"], stats["std"]) if stats else (known.mean(), known.std())
    return [(r - mean) / max(std, 1e-12) for r in raw]
