"""Describe a dataset in numbers: sizes, ties, scores, and how far its rewards agree."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from diffalign.data.dataset import PreferenceDataset
from diffalign.data.dataset_card import shuffled_words
from diffalign.data.rank import generator_explains
from diffalign.data.schema import HUMAN
from diffalign.data.tracked_noise import noise_words
from diffalign.errors import DiffalignError

SIZES_LOOKED_AT = 500


def by_size(dataset: PreferenceDataset) -> Iterator[np.ndarray]:
    """Yield positions in the image index as [groups, K], one array for each group size K."""
    starts = dataset.image_index.starts
    sizes = np.diff(starts)
    for size in np.unique(sizes[sizes > 0]):
        yield starts[:-1][sizes == size][:, None] + np.arange(size)


def pair_agreement(dataset: PreferenceDataset, a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """Compare how two scores order the pairs within groups. a, b: [images], in the order of the image index.

    agree: share of the pairs that both order, of which they order alike. tau: Kendall's tau-b over all pairs with both
    scores. tied: share of pairs that at least one score ties. NaN where there is no pair. pairs: those with both scores;
    by_a, by_b: how many of them each score orders.
    """
    same = other = tied_a = tied_b = both = 0
    for place in by_size(dataset):
        left, right = np.triu_indices(place.shape[1], k=1)
        x, y = (np.sign(v[place][:, left] - v[place][:, right]) for v in (a, b))
        known = np.isfinite(x) & np.isfinite(y)
        x, y = x[known], y[known]
        same += int((x * y > 0).sum())
        other += int((x * y < 0).sum())
        both += int(((x == 0) & (y == 0)).sum())
        tied_a += int(((x == 0) & (y != 0)).sum())
        tied_b += int(((x != 0) & (y == 0)).sum())
    strict = same + other
    total = strict + tied_a + tied_b + both
    scale = np.sqrt(float(strict + tied_a) * float(strict + tied_b))
    return {
        "agree": same / strict if strict else float("nan"),
        "tau": (same - other) / scale if scale else float("nan"),
        "tied": 1 - strict / total if total else float("nan"),
        "pairs": total,
        "by_a": strict + tied_b,
        "by_b": strict + tied_a,
    }


def agreement_words(found: Mapping[str, float], a: str, b: str) -> str:
    """Return in words what `pair_agreement` found for the scores a and b, or why they cannot be compared."""
    if not found["pairs"]:
        return "not comparable: no two images of a prompt have both scores"
    silent = [name for name, ordered in ((a, found["by_a"]), (b, found["by_b"])) if not ordered]
    if silent:
        ties = f"{' and '.join(silent)} {'ties' if len(silent) == 1 else 'tie'}"
        return f"not comparable: {ties} every pair that has both scores ({found['pairs']:.0f})"
    if math.isnan(found["agree"]):
        return (
            f"not comparable: each ties the pairs that the other orders ({found['by_a']:.0f} and {found['by_b']:.0f})"
        )
    return f"agree on {found['agree']:.0%} of pairs, tau {found['tau']:+.2f}"


def summarise_dataset(dataset: PreferenceDataset) -> dict[str, Any]:
    """Return the lines that `diffalign data inspect` prints, as name to value, from coarse to fine."""
    rows = [dataset.group(i) for i in range(len(dataset))]
    prompts = [row["prompt"] for row in rows]
    sizes = np.diff(dataset.image_index.starts)
    preferred = [row["preference"] or [] for row in rows]
    ranked = [p for p in preferred if p]
    unlabelled = sum(value is None or not math.isfinite(value) for given in dataset.human for value in given or [])
    generators = (
        Counter(str(name) for name in dataset.image_column("generator")) if len(dataset.image_index) else Counter()
    )
    facts: dict[str, Any] = {
        "groups": len(rows),
        "images": len(dataset.image_index),
        "images per group": _counted(Counter(int(n) for n in sizes)),
        "prompts": f"{len(set(prompts))} different, {np.mean([len(p) for p in prompts] or [0]):.0f} characters on average",
        "splits": _counted(Counter(row["split"] for row in rows)),
        "generators": _counted(generators),
        "sizes": _counted(picture_sizes(dataset)),
        "disk": f"{_bytes(sum(path.stat().st_size for path in dataset.shards))} in {len(dataset.shards)} files",
        "ranked": f"{len(ranked)} groups, {sum(len(set(p)) < 2 for p in ranked)} without a preference",
        **({"condition images": str(len(dataset.condition_index))} if len(dataset.condition_index) else {}),
        **({"noise": noise_words(dataset)} if len(dataset.image_index) else {}),
        **_labelled_by(dataset),
        **({"without a label": f"{unlabelled} images"} if unlabelled else {}),
        "tied pairs": f"{tied_pairs(ranked):.1%}",
        "dropped": _counted(Counter(row["dropped"] for row in rows if row["dropped"])) or "none",
    }
    explained = generator_explains(dataset, rows)
    if explained is not None:
        facts["generator explains"] = f"{explained:.0%} of the preferences"
    arrays: dict[str, np.ndarray] = {}
    for reward in dataset.rewards():
        for column in dataset.score_columns(reward):
            values = dataset.score_array(f"{reward}.{column}")
            known = values[np.isfinite(values)]
            missing = len(values) - len(known)
            facts[f"{reward}.{column}"] = (
                _spread_words(known) + (f", {missing} not scored" if missing else "")
                if len(known)
                else "nothing scored"
            )
        arrays[reward] = dataset.score_array(reward)
    if any(dataset.human):
        arrays[HUMAN] = dataset.score_array(HUMAN)
    names = list(arrays)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            found = pair_agreement(dataset, arrays[a], arrays[b])
            facts[f"{a} and {b}"] = agreement_words(found, a, b)
    return facts


def _spread_words(known: np.ndarray) -> str:
    """Return mean, standard deviation and range of scores in words, or that they are all equal."""
    if known.min() == known.max():
        return f"{known[0]:.4g} for every image that has a score"
    return f"mean {known.mean():.4g}, std {known.std():.4g}, {known.min():.4g} to {known.max():.4g}"


def _labelled_by(dataset: PreferenceDataset) -> dict[str, str]:
    """Return what the preferences are of, and how many groups people gave one for."""
    done, people = dataset.ranking(), sum(map(bool, dataset.human))
    facts = {"ranked by": ", ".join(done["settings"]["sources"])} if done else {}
    if done and done["settings"]["shuffle"]:
        facts["shuffled"] = shuffled_words(done["settings"])
    facts |= {"judged by people": f"{people} groups"} if people else {}
    voted = Counter(vote.rater for vote in dataset.votes if vote.ranks)
    return facts | ({"votes": _counted(voted)} if voted else {})


def tied_pairs(preferences: list[list[float]]) -> float:
    """Return the share of pairs within groups whose preferences are equal."""
    tied = pairs = 0
    for values in preferences:
        counts = Counter(values)
        tied += sum(n * (n - 1) // 2 for n in counts.values())
        pairs += len(values) * (len(values) - 1) // 2
    return tied / pairs if pairs else 0.0


def picture_sizes(dataset: PreferenceDataset) -> Counter[str]:
    """Count widths and heights of up to 500 images, spread evenly over the dataset."""
    sizes: Counter[str] = Counter()
    for place in np.unique(np.linspace(0, len(dataset.image_index) - 1, SIZES_LOOKED_AT).astype(int)):
        if len(dataset.image_index):
            image = dataset.image_at(int(place))
            try:
                sizes["{}x{}".format(*image.decode().size)] += 1
            except DiffalignError:
                sizes["unreadable"] += 1
    return sizes


def _counted(counts: Counter[Any]) -> str:
    shown = [f"{key}: {n}" if len(counts) > 1 else str(key) for key, n in counts.most_common(8)]
    return ", ".join(shown) + (f" and {len(counts) - 8} more" if len(counts) > 8 else "")


def _bytes(size: float) -> str:
    """Return a number of bytes in the unit that reads best."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} GB"
