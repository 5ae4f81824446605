"""From scores to preferences: Syn-Pic's vote shares (RankDPO, arXiv 2410.18013, section 3.2 and Algorithm 1).

Only groups.parquet is written, from images and scores that stay as they are, so a dataset can be ranked again at will.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from diffalign.data.choose_members import Limit, choose_members, near_duplicates, split_of
from diffalign.data.dataset import PreferenceDataset
from diffalign.data.hashes import image_hashes
from diffalign.data.writer import write_groups
from diffalign.draws import draw
from diffalign.errors import DiffalignError
from diffalign.rewards.aggregate import vote_shares

GENERATOR_EXPLAINS = 0.5


@dataclass(frozen=True)
class Rules:
    """How scores become preferences, besides which rewards vote. The defaults are Syn-Pic's.

    aggregate: `votes`, or `mean`: each reward's scores are z-scored over the dataset and averaged, and the mean is the one
    voter. weights: votes, or weight in the mean, of each reward (1). min_gap: groups whose best and worst differ by less,
    in shares or in units of the mean, are dropped. choose, k: which k images of a larger group count. limits: images
    outside are left out. duplicates: images that differ from a better one by at most so many of 64 bits are left out.
    splits: share of the prompts in each split but `train`, which gets the rest; None: splits stay as they are.
    """

    aggregate: Literal["votes", "mean"] = "votes"
    weights: dict[str, float] = field(default_factory=dict)
    min_gap: float = 0.0
    choose: Literal["all", "extremes", "random", "variance"] = "all"
    k: int | None = None
    limits: tuple[Limit, ...] = ()
    duplicates: int | None = None
    splits: dict[str, float] | None = None
    seed: int = 0


def rank(
    dataset: PreferenceDataset, sources: list[str], shuffle_seed: int | None = None, rules: Rules | None = None
) -> dict[str, Any]:
    """Write `preference` into groups.parquet from the named rewards ("geneval" or "geneval.exact").

    `shuffle_seed` gives each group's shares to its images at random: the control that any honest result must beat.
    Returns what was done: groups, how many were dropped for which reason, images that count, and `generator_explains`, the
    share of the preferences' variance that the generators' means alone explain (None with one generator).
    """
    rules = rules or Rules()
    if not sources:
        raise DiffalignError(f"{dataset.folder}: no reward to rank by; score it first")
    scores = np.stack([dataset.score_array(source) for source in sources])
    weights = _weights(sources, rules.weights)
    limits = [(limit, dataset.score_array(limit.source)) for limit in rules.limits]
    hashes = image_hashes(dataset) if rules.duplicates is not None else None
    combined = _mean_score(scores, weights) if rules.aggregate == "mean" else None
    places, rows = dataset.image_index, []
    for i in range(len(dataset)):
        row, here = dataset.group(i), slice(int(places.starts[i]), int(places.starts[i + 1]))
        members = places.indices(i)

        def values(of: np.ndarray, here: slice = here) -> np.ndarray:
            if combined is not None:
                return combined[here][of]
            return vote_shares(scores[:, here][:, of], None if not rules.weights else weights)

        kept = np.arange(len(members))
        for limit, measured in limits:
            kept = kept[limit.holds(measured[here][kept])]
        if hashes is not None and rules.duplicates is not None:
            kept = kept[~near_duplicates(hashes[here][kept], values(kept), rules.duplicates)]
        order = draw(rules.seed, "choose", group=row["group_id"])
        kept = kept[choose_members(values(kept), rules.choose, rules.k, order)] if len(kept) else kept
        value = values(kept) if len(kept) else np.zeros(0)
        dropped = _dropped(value, len(kept), len(members), rules.min_gap)
        shares = value if combined is None else vote_shares(value[None])
        if shuffle_seed is not None:
            shares = draw(shuffle_seed, "shuffle", group=row["group_id"]).permutation(shares)
        rows.append(
            {
                **row,
                "preference": [float(s) for s in shares],
                "members": None if len(kept) == len(members) else [int(m) for m in members[kept]],
                "dropped": dropped,
                "split": split_of(row["prompt"], rules.splits, rules.seed) if rules.splits else row["split"],
            }
        )
    write_groups(dataset.folder, rows)
    return _report(dataset, rows)


def _weights(sources: list[str], given: dict[str, float]) -> np.ndarray:
    unknown = set(given) - set(sources)
    if unknown:
        raise DiffalignError(f"rank.weights: {sorted(unknown)[0]} does not vote; the voters are {', '.join(sources)}")
    return np.array([given.get(source, 1.0) for source in sources])


def _mean_score(scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted mean of z-scores [images]; NaN where any reward has none."""
    mean = np.nanmean(scores, axis=1, keepdims=True)
    std = np.nanstd(scores, axis=1, keepdims=True)
    return np.asarray(np.average((scores - mean) / np.maximum(std, 1e-12), axis=0, weights=weights))


def _dropped(value: np.ndarray, kept: int, members: int, min_gap: float) -> str | None:
    """Why a group is left out, or None."""
    if kept < 2 and kept < members:
        return "fewer than two images left"
    if min_gap > 0 and (
        kept < 2 or not np.nanmax(value, initial=-np.inf) - np.nanmin(value, initial=np.inf) >= min_gap
    ):
        return "near tie"
    return None


def _report(dataset: PreferenceDataset, rows: list[dict[str, Any]]) -> dict[str, Any]:
    reasons = [row["dropped"] for row in rows if row["dropped"]]
    used = [row for row in rows if not row["dropped"]]
    return {
        "groups": len(rows),
        "dropped": {reason: reasons.count(reason) for reason in sorted(set(reasons))},
        "images": sum(len(row["preference"]) for row in used),
        "without_preference": sum(len(set(row["preference"])) < 2 for row in used),
        "splits": {name: sum(row["split"] == name for row in used) for name in sorted({row["split"] for row in used})},
        "generator_explains": generator_explains(dataset, rows),
    }


def generator_explains(dataset: PreferenceDataset, rows: list[dict[str, Any]]) -> float | None:
    """Share of the variance of preferences (within groups) that the generators' means explain; None with one generator.

    Near 1, training mostly teaches the look of the better generator. By chance it is near generators / images.
    """
    generators = dataset.image_column("generator")
    names: list[Any] = []
    values: list[float] = []
    for i, row in enumerate(rows):
        indices, start = dataset.image_index.indices(i), int(dataset.image_index.starts[i])
        chosen = set(row["members"]) if row["members"] is not None else None
        here = [start + n for n, index in enumerate(indices) if chosen is None or int(index) in chosen]
        if row["dropped"] or len(here) < 2 or len(here) != len(row["preference"]):
            continue
        names.extend(generators[here])
        values.extend(np.array(row["preference"]) - np.mean(row["preference"]))
    _, which = np.unique(np.array(names, dtype=str), return_inverse=True)
    total = float(np.square(values).sum())
    if len(set(which)) < 2 or total == 0:
        return None
    sums, counts = np.bincount(which, values), np.bincount(which)
    return float((sums**2 / counts).sum() / total)


def generator_warning(explained: float | None) -> str | None:
    """What to say when the generators decide the ranking (the control is one generator alone)."""
    if explained is None or explained < GENERATOR_EXPLAINS:
        return None
    return (
        f"warning: which generator drew an image explains {explained:.0%} of the preferences: training on them may teach "
        "the look of one generator; rank the images of one generator alone as a control, or draw several from each"
    )
