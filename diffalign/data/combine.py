"""Several rewards as one label: `labels.source: combined`. The arithmetic is in `diffalign.rewards.aggregate`."""

import numpy as np

from diffalign.data.dataset import PreferenceDataset
from diffalign.data.labels import raw_labels
from diffalign.data.protocols import CombineSettings
from diffalign.errors import DiffalignError
from diffalign.rewards.aggregate import Calibration, dvao, gated, weighted_sum


def calibrations(dataset: PreferenceDataset, groups: list[int], combine: CombineSettings) -> dict[str, float]:
    """{"NAME.mean", "NAME.std"} of every reward of `combine.weights` over these groups, to be stored with the run."""
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
    """One array [K] a group from several rewards; NaN where one of weight above 0 could not score an image.

    combine: how, weights, gates (a config's `labels.combine`); stats: those of `calibrations`. Every reward is z-scored
    over the dataset, so that none drowns the others by its unit. `sum` adds them up. `dvao` divides the centred sum by the
    group's weighted deviations: the order is that of `sum`, only the sharpness differs from group to group. `gated` puts
    an image that reaches more of the gates first.
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
            # A score that is missing passes no gate.
            total = gated(total, np.stack([values[place] >= floor for values, floor in gates]))
        found.append(total)
    return found
