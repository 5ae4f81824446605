"""From scores to preferences: Syn-Pic's vote shares (RankDPO, arXiv 2410.18013, section 3.2 and Algorithm 1)."""

from typing import Any

import numpy as np

from diffalign.data.dataset import PreferenceDataset
from diffalign.data.writer import write_groups
from diffalign.draws import draw


def vote_shares(scores: np.ndarray) -> np.ndarray:
    """Share of won comparisons of each image, [K] in [0, 1], from scores [R rewards, K images].

    Every reward compares every pair; only a strictly higher score wins, so a tie gives nobody a vote. A pair with a NaN
    casts no vote and leaves the denominator; an image that was never compared gets 0. No reward is rescaled: any
    increasing transform of any reward leaves the shares unchanged.
    """
    a, b = scores[:, :, None], scores[:, None, :]
    known = np.isfinite(a) & np.isfinite(b) & ~np.eye(scores.shape[1], dtype=bool)
    wins = ((a > b) & known).sum(axis=(0, 2))
    compared = known.sum(axis=(0, 2))
    return (wins / np.maximum(compared, 1)).astype(np.float64)


def rank(dataset: PreferenceDataset, sources: list[str], shuffle_seed: int | None = None) -> None:
    """Write `preference` into groups.parquet from the named rewards ("geneval" or "geneval.exact").

    `shuffle_seed` gives each group's shares to its images at random: the control that any honest result must beat.
    """
    columns = []
    for source in sources:
        reward, _, column = source.partition(".")
        columns.append(dataset.scores(reward, column or None))
    rows = [dataset.group(i) for i in range(len(dataset))]

    def preference(row: dict[str, Any]) -> list[float]:
        group = row["group_id"]
        members = dataset.members(group)
        scores = np.array([[column.get((group, m), float("nan")) for m in members] for column in columns])
        shares = vote_shares(scores) if members else np.zeros(0)
        if shuffle_seed is not None:
            shares = draw(shuffle_seed, "shuffle", group=group).permutation(shares)
        return [float(s) for s in shares]

    write_groups(dataset.folder, ({**row, "preference": preference(row)} for row in rows))
