"""Fit a person's taste: choices between images to a linear head on frozen features, checked on prompts that it did not see."""

from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch

from diffalign import stopping
from diffalign.bradley_terry import fit_linear, log_loss
from diffalign.data.dataset import PreferenceDataset
from diffalign.draws import draw
from diffalign.errors import DiffalignError
from diffalign.intervals import Interval, share_interval
from diffalign.rewards.features import Features
from diffalign.terminal import counted
from diffalign.voting.log import Vote

FEWEST_PAIRS = 50
"""Choices below which nothing is fitted: held-out accuracy could not tell a taste from chance."""
RIDGES = tuple(10.0 ** (power / 2) for power in range(6, -5, -1))
"""Ridges that are tried, strong to weak, on standardised features times their importance."""


@dataclass(frozen=True)
class Choices:
    """Comparisons of images.

    first, second: places in `image_index`, int [N]. wins: [N], 1 where the first was chosen, 0.5 for a tie. prompts: the
    prompt of each, which is held out as a whole.
    """

    first: np.ndarray
    second: np.ndarray
    wins: np.ndarray
    prompts: list[str]

    def __len__(self) -> int:
        """Return the number of comparisons."""
        return len(self.wins)

    def and_also(self, others: "Choices") -> "Choices":
        """Return these comparisons and others."""
        return Choices(
            np.concatenate([self.first, others.first]),
            np.concatenate([self.second, others.second]),
            np.concatenate([self.wins, others.wins]),
            [*self.prompts, *others.prompts],
        )

    @property
    def ties(self) -> int:
        """The number of comparisons that chose neither."""
        return int((self.wins == 0.5).sum())


@dataclass(frozen=True)
class Taste:
    """A fitted head: score = (features - mean) . weight, float64 [D].

    accuracy: share of right choices on prompts that were held out, a predicted tie counts half, with its interval over
    prompts; loss: mean log loss there (log 2 is chance).
    """

    weight: np.ndarray
    mean: np.ndarray
    ridge: float
    accuracy: float
    interval: Interval
    loss: float


def choices_of(dataset: PreferenceDataset, source: str, split: str, without: Container[str] = ()) -> Choices:
    """Return every pair of labelled images within the groups of a split.

    source: as `score_array` takes it. Equal values are a tie. without: ids of groups to leave out.
    """
    values, index = dataset.score_array(source), dataset.image_index
    ids, prompts = dataset.column("group_id"), dataset.column("prompt")
    found: list[tuple[int, int, float, str]] = []
    for row in dataset.split(split):
        if ids[row] in without:
            continue
        places = int(index.starts[row]) + np.arange(len(index.indices(row)))
        known = places[np.isfinite(values[places])].tolist()
        found += [(a, b, 0.5 * (1 + np.sign(values[a] - values[b])), prompts[row]) for a, b in combinations(known, 2)]
    return _choices(found)


def choices_in(votes: Iterable[Vote], dataset: PreferenceDataset) -> Choices:
    """Return the comparisons in votes: of a ranking every pair. Skipped questions say nothing.

    Votes on images that are not in the dataset are left out.
    """
    found: list[tuple[int, int, float, str]] = []
    for vote in votes:
        places = [_place(dataset, name) for name in vote.images]
        if not vote.ranks or min(places) < 0:
            continue
        for (a, rank), (b, other) in combinations(zip(places, vote.ranks, strict=True), 2):
            found.append((a, b, 0.5 * (1 + (rank < other) - (rank > other)), vote.prompt))
    return _choices(found)


def _choices(found: list[tuple[int, int, float, str]]) -> Choices:
    first, second = (np.array([one[n] for one in found], dtype=np.int64) for n in (0, 1))
    return Choices(first, second, np.array([one[2] for one in found]), [one[3] for one in found])


def _place(dataset: PreferenceDataset, name: str) -> int:
    """Return the place in `image_index` of an image that is named `group/index`; -1 if there is none."""
    group, _, index = name.rpartition("/")
    row = dataset.row(group)
    known = row is not None and index.isdecimal()
    return int(dataset.image_index.find(np.array([row]), np.array([int(index)]))[0]) if known else -1


@torch.no_grad()
def features_of(
    dataset: PreferenceDataset,
    places: np.ndarray,
    features: Features,
    batch_size: int,
    on_progress: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """Return the features of the images at these places of `image_index`, float64 [len(places), D]."""
    found = []
    for start in range(0, len(places), batch_size):
        stopping.check()
        rows = [dataset.image_at(int(place)) for place in places[start : start + batch_size]]
        prepared = torch.stack([features.prepare(row.decode()) for row in rows])
        prompts = [dataset.group(dataset.row(row.group_id) or 0)["prompt"] for row in rows]
        found.append(features.embed(prepared, prompts).double().cpu().numpy())
        on_progress(start + len(rows))
    return np.concatenate(found)


def fit_taste(
    features: np.ndarray,
    importance: np.ndarray,
    choices: Choices,
    folds: int = 5,
    ridge: float | None = None,
    seed: int = 0,
) -> Taste:
    """Fit a head to choices and measure it on held-out prompts.

    features: [images, D]; the places in `choices` are its rows. importance: [D], what standardised features are multiplied
    by, so that the ridge lets those with more say more. folds: parts of the prompts, each held out once. ridge: None for the
    one with the least log loss on held-out prompts; for the accuracy it is chosen without the part that is held out. Raises
    DiffalignError for fewer than 50 choices, or where all are of one prompt.
    """
    check_enough(choices)
    used = np.unique(np.concatenate([choices.first, choices.second]))
    mean, deviation = features[used].mean(0), features[used].std(0)
    scale = np.where(deviation > 1e-9, importance / np.maximum(deviation, 1e-9), 0.0)
    rows = (features[choices.first] - features[choices.second]) * scale
    basis = None
    if rows.shape[1] > rows.shape[0]:  # the solution lies in the space of the rows, and so does every fold's
        _, size, basis = np.linalg.svd(rows, full_matrices=False)
        basis = basis[size > 1e-10 * size[0]]
        rows = rows @ basis.T
    fold = _folds(choices.prompts, folds, seed)
    ridges = RIDGES if ridge is None else (ridge,)
    held_out = np.empty(len(choices))
    for part in np.unique(fold):
        rest = fold != part
        chosen = _best_ridge(rows[rest], choices.wins[rest], fold[rest], ridges)
        held_out[~rest] = rows[~rest] @ fit_linear(rows[rest], choices.wins[rest], chosen)
    best = _best_ridge(rows, choices.wins, fold, ridges)
    weight = fit_linear(rows, choices.wins, best)
    decided = choices.wins != 0.5
    right = np.where(held_out == 0, 0.5, (held_out > 0) == (choices.wins > 0.5))[decided]
    prompts = [prompt for prompt, counts in zip(choices.prompts, decided, strict=True) if counts]
    return Taste(
        (weight if basis is None else weight @ basis) * scale,
        mean,
        best,
        float(right.mean()),
        share_interval(right, prompts, seed=seed),
        log_loss(held_out, choices.wins),
    )


def check_enough(choices: Choices) -> None:
    """Raise DiffalignError for fewer than 50 choices, or where all are of one prompt."""
    decided = len(choices) - choices.ties
    if decided < FEWEST_PAIRS:
        ties = f" and {counted(choices.ties, 'tie')}" if choices.ties else ""
        raise DiffalignError(
            f"{decided} choices between two images{ties}: at least {FEWEST_PAIRS} choices are needed; vote on more pairs"
        )
    if len(set(choices.prompts)) < 2:
        raise DiffalignError(
            f"all {len(choices)} choices are of one prompt, so none can be held out; vote on pictures of other prompts, too"
        )


def _folds(prompts: list[str], folds: int, seed: int) -> np.ndarray:
    """Return the part of each comparison, int [N]: whole prompts, at random."""
    names = sorted(set(prompts))
    order = draw(seed, "personal-folds").permutation(len(names))
    part = {name: int(place) % folds for name, place in zip(names, order, strict=True)}
    return np.array([part[prompt] for prompt in prompts])


def _best_ridge(rows: np.ndarray, wins: np.ndarray, fold: np.ndarray, ridges: tuple[float, ...]) -> float:
    """Return the ridge with the least log loss on parts that are held out in turn."""
    parts = np.unique(fold)
    if len(ridges) == 1 or len(parts) < 2:
        return ridges[0]
    held_out = np.empty((len(ridges), len(wins)))
    for part in parts:
        rest = fold != part
        weights = None
        for n, ridge in enumerate(ridges):
            weights = fit_linear(rows[rest], wins[rest], ridge, weights)
            held_out[n, ~rest] = rows[~rest] @ weights
    return ridges[int(np.argmin([log_loss(z, wins) for z in held_out]))]
