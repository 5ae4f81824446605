"""Combine several rewards into one label (`labels.source: combined`); `diffalign.rewards.aggregate` has the arithmetic."""

import numpy as np

from diffalign.data.dataset import PreferenceDataset
from diffalign.data.labels import raw_labels
from diffalign.data.protocols import CombineSettings
from diffalign.errors import DiffalignError
from diffalign.rewards.aggregate import Calibration, dvao, gated, weighted_sum


def calibrations(dataset: PreferenceDataset, groups: list[int], combine: CombineSettings) -> dict[str, float]:
    """Return {"NAME.mean", "NAME.std"} of every reward in `combine.weights` over these groups, to store with the run."""
    found: dict[str, float] = {}
    for name in combine.weights:
        scores = np.concatenate(raw_labels(dataset, groups, f"scores.{name}"))
        try:
            scale = Calibration.of(scores)
        except DiffalignError as error:
            raise DiffalignError(f"labels.combine.weights: {name}: {error}") from error
        found |= {f"{name}.mean": scale.mean, f"{name}.std": scale.std}
    return found


def combined_labels(
    dataset: PreferenceDataset, groups: list[int], combine: CombineSettings, stats: dict[str, float]
) -> list[np.ndarray]:
    """Return one array [K] a group; NaN where a reward with a weight above 0, or a gate, could not score an image.

    stats: what `calibrations` returned. Every reward is z-scored over the dataset, so that none dominates by its unit.
    `sum` adds them up. `dvao` divides the centred sum by the group's weighted deviations: the order is that of `sum`,
    only the sharpness differs between groups. `gated` ranks an image that passes more of the gates first.
    """
    names, weights = list(combine.weights), list(combine.weights.values())
    scales = [Calibration(stats[f"{name}.mean"], stats[f"{name}.std"]) for name in names]
    raw = [raw_labels(dataset, groups, f"scores.{name}") for name in names]
    gates = [(raw_labels(dataset, groups, f"scores.{name}"), floor) for name, floor in combine.gates.items()]
    found = []
    for place in range(len(groups)):
        scores = np.stack([values[place] for values in raw])
        if combine.how == "dvao":
            scaled = np.stack([scale.apply(row) for scale, row in zip(scales, scores, strict=True)])
            found.append(dvao(scaled, weights)[0])
            continue
        total = weighted_sum(scores, weights, scales)
        if combine.how == "gated":
            constraints = np.stack([values[place] for values, _ in gates])
            floors = np.array([[floor] for _, floor in gates])
            # Whether an image without a score passes is unknown: it has no place in the order.
            total = gated(np.where(np.isfinite(constraints).all(axis=0), total, np.nan), constraints >= floors)
        found.append(total)
    return found
