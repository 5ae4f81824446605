"""Combine several rewards into one label (`labels.source: combined`); `diffalign.rewards.aggregate` has the arithmetic."""

from collections.abc import Callable

import numpy as np

from diffalign.data.dataset import PreferenceDataset
from diffalign.data.labels import raw_labels, scaled, statistics
from diffalign.data.protocols import CombineSettings, LabelSettings
from diffalign.errors import DiffalignError
from diffalign.rewards.aggregate import Calibration, dvao, gated, weighted_sum

ReadLabels = Callable[[str], list[np.ndarray]]
"""Returns the labels of a source such as "scores.NAME" as they are, one array [K] a group."""


def transformed_labels(read: ReadLabels, label: LabelSettings) -> tuple[list[np.ndarray], dict[str, float]]:
    """Return the labels of groups that a config's `labels` section describes, and the scale that was used.

    The scale is that of the section or, where it states none, is taken over these groups.
    """
    if label.source != "combined":
        raw = read(label.source)
        stats = dict(label.stats or statistics(raw, label.transform, label.spread))
        return scaled(raw, label.transform, stats), stats
    assert label.combine is not None  # the config is checked
    stats = dict(label.stats or scales(read, label.combine))
    raw = combined(read, label.combine, stats)
    # Those of the rewards are theirs, and a deviation of the sum comes on top.
    stats |= {key: value for key, value in statistics(raw, label.transform, label.spread).items() if key not in stats}
    return scaled(raw, label.transform, stats), stats


def calibrations(dataset: PreferenceDataset, groups: list[int], combine: CombineSettings) -> dict[str, float]:
    """Return `scales` of stored scores."""
    return scales(lambda source: raw_labels(dataset, groups, source), combine)


def combined_labels(
    dataset: PreferenceDataset, groups: list[int], combine: CombineSettings, stats: dict[str, float]
) -> list[np.ndarray]:
    """Return `combined` of stored scores."""
    return combined(lambda source: raw_labels(dataset, groups, source), combine, stats)


def scales(read: ReadLabels, combine: CombineSettings) -> dict[str, float]:
    """Return {"NAME.mean", "NAME.std"} of every reward in `combine.weights` over these groups, to store with the run."""
    found: dict[str, float] = {}
    for name in combine.weights:
        scores = np.concatenate(read(f"scores.{name}"))
        try:
            scale = Calibration.of(scores)
        except DiffalignError as error:
            raise DiffalignError(f"labels.combine.weights: {name}: {error}") from error
        found |= {f"{name}.mean": scale.mean, f"{name}.std": scale.std}
    return found


def combined(read: ReadLabels, combine: CombineSettings, stats: dict[str, float]) -> list[np.ndarray]:
    """Return one array [K] a group; NaN where a reward with a weight above 0, or a gate, could not score an image.

    stats: what `scales` returned. Every reward is z-scored over the dataset, so that none dominates by its unit.
    `sum` adds them up. `dvao` divides the centred sum by the group's weighted deviations: the order is that of `sum`,
    only the sharpness differs between groups. `gated` ranks an image that passes more of the gates first.
    """
    names, weights = list(combine.weights), list(combine.weights.values())
    given = [Calibration(stats[f"{name}.mean"], stats[f"{name}.std"]) for name in names]
    raw = [read(f"scores.{name}") for name in names]
    gates = [(read(f"scores.{name}"), floor) for name, floor in combine.gates.items()]
    found = []
    for place in range(len(raw[0])):
        scores = np.stack([values[place] for values in raw])
        if combine.how == "dvao":
            alike = np.stack([scale.apply(row) for scale, row in zip(given, scores, strict=True)])
            found.append(dvao(alike, weights)[0])
            continue
        total = weighted_sum(scores, weights, given)
        if combine.how == "gated":
            constraints = np.stack([values[place] for values, _ in gates])
            floors = np.array([[floor] for _, floor in gates])
            # Whether an image without a score passes is unknown: it has no place in the order.
            total = gated(np.where(np.isfinite(constraints).all(axis=0), total, np.nan), constraints >= floors)
        found.append(total)
    return found
