"""Turn scores into preferences: Syn-Pic's vote shares (RankDPO, arXiv 2410.18013, section 3.2 and Algorithm 1).

Only groups.parquet is written; images and scores stay as they are, so a dataset can be ranked again at any time.
Absent is not lowest: an image that no reward with a say has scored is left out of the ranking, and the others stay.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from diffalign.data.choose_members import Limit, choose_members, near_duplicates, split_of
from diffalign.data.dataset import PreferenceDataset
from diffalign.data.hashes import image_hashes
from diffalign.data.schema import HUMAN, GroupRow
from diffalign.data.writer import write_groups
from diffalign.draws import draw
from diffalign.errors import DiffalignError
from diffalign.rewards.aggregate import vote_shares

GENERATOR_EXPLAINS = 0.5
NEAR_TIE = "near tie"
"""Why a group is dropped whose best and worst are closer than `min_gap`."""


@dataclass(frozen=True)
class Rules:
    """How scores become preferences. The defaults are Syn-Pic's.

    aggregate: `votes`; or `mean`: each reward's scores are z-scored over the dataset and averaged, and the mean is the
    one voter. weights: votes, or weight in the mean, of each reward (default 1). min_gap: groups whose best and worst
    differ by less, in shares or in units of the mean, are dropped. choose, k: which k images of a larger group count.
    limits: images outside them do not count. duplicates: an image does not count if it differs from a better one by at
    most this many of 64 bits. splits: share of the prompts in each split except `train`, which gets the rest; None:
    splits stay as they are.
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
    """Write `preference` into groups.parquet from the named rewards ("geneval" or "geneval.exact") or `human`.

    `human` alone puts back the preferences that people gave, to the last bit; beside rewards it is one more voter.
    `shuffle_seed` permutes each group's shares at random: the control that any honest result must beat. Returns a
    report: groups, how many were dropped for which reason, images that count, `without_score`, the images that are left
    out because no voter has scored them (with `mean`: because one has not), `gaps`, the least, median and largest
    difference of best and worst in groups that are not all equal (None if all are), and `generator_explains`, the share
    of the preferences' variance that the generators' means alone explain (None with one generator).
    """
    rules = rules or Rules()
    if not sources:
        raise DiffalignError(f"{dataset.folder}: no reward to rank by; score it first")
    evidence = _gather(dataset, sources, rules)
    index, rows = dataset.image_index, []
    gaps: list[float] = []
    without_score = int((~evidence.scored).sum())
    for i in range(len(dataset)):
        row, members, start = dataset.group(i), index.indices(i), int(index.starts[i])
        kept = _kept(evidence, rules, start, len(members), draw(rules.seed, "choose", group=row["group_id"]))
        values = evidence.values(start + kept)
        shares = vote_shares(values[None]) if evidence.reduced else values
        if shuffle_seed is not None:
            shares = draw(shuffle_seed, "shuffle", group=row["group_id"]).permutation(shares)
        row["preference"] = [float(s) for s in shares]
        row["members"] = None if len(kept) == len(members) else [int(m) for m in members[kept]]
        row["dropped"] = _dropped(values, len(members), rules.min_gap)
        gaps += [float(np.ptp(values))] if len(values) else []
        if rules.splits:
            row["split"] = split_of(row["prompt"], rules.splits, rules.seed)
        rows.append(row)
    write_groups(dataset.folder, rows)
    return {**_report(dataset, rows), "without_score": without_score, "gaps": _gaps(gaps)}


@dataclass(frozen=True)
class _Evidence:
    """What decides a ranking; arrays are in the order of `dataset.image_index`."""

    scores: np.ndarray
    """[R, images] scores of the rewards that vote."""
    weights: np.ndarray
    """[R] votes of each reward, above 0."""
    combined: np.ndarray | None
    """[images] the one voter of `aggregate: mean`, or the preferences of people where nobody else votes."""
    reduced: bool
    """Whether `combined` is still to be turned into vote shares."""
    limits: list[tuple[Limit, np.ndarray]]
    """Each with the scores [images] that it bounds."""
    hashes: np.ndarray | None
    """[images] uint64, where near duplicates are left out."""

    @property
    def scored(self) -> np.ndarray:
        """Which images have what they are ranked by, bool [images]."""
        return np.isfinite(self.scores).any(axis=0) if self.combined is None else np.isfinite(self.combined)

    def values(self, places: np.ndarray) -> np.ndarray:
        """Return what orders the scored images at these places, which are of one group: [n], higher is better.

        NaN for an image that none of the others can be compared with.
        """
        if self.combined is not None:
            return self.combined[places]
        if len(places) < 2:
            return np.zeros(len(places))
        return vote_shares(self.scores[:, places], self.weights)


def _gather(dataset: PreferenceDataset, sources: list[str], rules: Rules) -> _Evidence:
    weights = _weights(sources, rules.weights)
    has_say = weights > 0
    if not has_say.any():
        raise DiffalignError("rank.weights: no voter has a weight above 0; give one to at least one of them")
    scores = np.stack([dataset.score_array(source) for source, say in zip(sources, has_say, strict=True) if say])
    weights = weights[has_say]
    as_given = sources == [HUMAN]
    mean = _mean_score(scores, weights) if rules.aggregate == "mean" and not as_given else None
    return _Evidence(
        scores,
        weights,
        scores[0] if as_given else mean,
        mean is not None,
        [(limit, dataset.score_array(limit.source)) for limit in rules.limits],
        image_hashes(dataset) if rules.duplicates is not None else None,
    )


def _kept(evidence: _Evidence, rules: Rules, start: int, count: int, generator: np.random.Generator) -> np.ndarray:
    """Return which of a group's images count, as positions below `count`; the first of them is at place `start`."""
    kept = np.flatnonzero(evidence.scored[start : start + count])
    for limit, scores in evidence.limits:
        kept = kept[limit.holds(scores[start + kept])]
    if evidence.hashes is not None and rules.duplicates is not None:
        values = evidence.values(start + kept)
        kept = kept[~near_duplicates(evidence.hashes[start + kept], values, rules.duplicates)]
    kept = kept[choose_members(evidence.values(start + kept), rules.choose, rules.k, generator)]
    # What was chosen may hold an image that can be compared with none of the others: they have no voter in common.
    return kept[np.isfinite(evidence.values(start + kept))]


def _weights(sources: list[str], given: dict[str, float]) -> np.ndarray:
    unknown = set(given) - set(sources)
    if unknown:
        raise DiffalignError(f"rank.weights: {sorted(unknown)[0]} does not vote; the voters are {', '.join(sources)}")
    return np.array([given.get(source, 1.0) for source in sources])


def _mean_score(scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the weighted mean of z-scores [images]; NaN where any reward has none."""
    known = np.isfinite(scores)
    if not known.any(axis=1).all():
        return np.full(scores.shape[1], np.nan)
    scores = np.where(known, scores, np.nan)
    mean = np.nanmean(scores, axis=1, keepdims=True)
    std = np.nanstd(scores, axis=1, keepdims=True)
    return np.asarray(np.average((scores - mean) / np.maximum(std, 1e-12), axis=0, weights=weights))


def _dropped(values: np.ndarray, members: int, min_gap: float) -> str | None:
    """Return why a group of `members` images, of which those with `values` count, is left out; None if it is not."""
    if len(values) < 2 and len(values) < members:
        return "fewer than two images left"
    if min_gap > 0:
        if len(values) < 2 or not np.ptp(values) >= min_gap:
            return NEAR_TIE
    return None


def _gaps(gaps: list[float]) -> list[float] | None:
    """Return the least, median and largest gap of best and worst that is not 0; None if there is none."""
    real = [gap for gap in gaps if gap > 0]
    return [min(real), float(np.median(real)), max(real)] if real else None


def write_splits(dataset: PreferenceDataset, shares: dict[str, float], seed: int) -> None:
    """Write the splits into groups.parquet, by each group's prompt; no label is touched."""
    rows = [dataset.group(i) for i in range(len(dataset))]
    write_groups(dataset.folder, [{**row, "split": split_of(row["prompt"], shares, seed)} for row in rows])


def is_split(dataset: PreferenceDataset, shares: dict[str, float], seed: int) -> bool:
    """Return whether the groups lie in these splits already."""
    prompts, splits = dataset.column("prompt"), dataset.column("split")
    return all(split_of(prompt, shares, seed) == name for prompt, name in zip(prompts, splits, strict=True))


def _report(dataset: PreferenceDataset, rows: list[GroupRow]) -> dict[str, Any]:
    reasons = [row["dropped"] for row in rows if row["dropped"]]
    used = [row for row in rows if not row["dropped"]]
    return {
        "groups": len(rows),
        "dropped": {reason: reasons.count(reason) for reason in sorted(set(reasons))},
        "images": sum(len(row["preference"] or []) for row in used),
        "without_preference": sum(len(set(row["preference"] or [])) < 2 for row in used),
        "splits": {name: sum(row["split"] == name for row in used) for name in sorted({row["split"] for row in used})},
        "generator_explains": generator_explains(dataset, rows),
    }


def generator_explains(dataset: PreferenceDataset, rows: list[GroupRow]) -> float | None:
    """Return the share of the variance of preferences within groups that the generators' means explain.

    None with one generator. Near 1, training mostly teaches the look of the better generator. By chance it is about
    generators / images.
    """
    generators = dataset.image_column("generator")
    names: list[Any] = []
    values: list[float] = []
    for i, row in enumerate(rows):
        indices, start = dataset.image_index.indices(i), int(dataset.image_index.starts[i])
        chosen, preference = row["members"], row["preference"] or []
        here = [start + n for n, index in enumerate(indices) if chosen is None or int(index) in chosen]
        if row["dropped"] or len(here) < 2 or len(here) != len(preference):
            continue
        names.extend(generators[here])
        values.extend(np.array(preference) - np.mean(preference))
    _, which = np.unique(np.array(names, dtype=str), return_inverse=True)
    total = float(np.square(values).sum())
    if len(set(which)) < 2 or total == 0:
        return None
    sums, counts = np.bincount(which, values), np.bincount(which)
    return float((sums**2 / counts).sum() / total)


def generator_warning(explained: float | None) -> str | None:
    """Return a warning if the generators decide the ranking, else None (the control is one generator alone)."""
    if explained is None or explained < GENERATOR_EXPLAINS:
        return None
    return (
        f"warning: which generator drew an image explains {explained:.0%} of the preferences: training on them may teach "
        "the look of one generator; rank the images of one generator alone as a control, or draw several from each"
    )
