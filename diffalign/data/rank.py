"""From scores to preferences: Syn-Pic's vote shares (RankDPO, arXiv 2410.18013, section 3.2 and Algorithm 1)."""

from typing import Any

import numpy as np

from diffalign.data.dataset import PreferenceDataset
from diffalign.data.writer import write_groups
from diffalign.draws import draw
from diffalign.rewards.aggregate import vote_shares


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
