"""Measure how often a reward and people choose the same image.

Labels are a table with one of

    image_a, image_b, choice     choice: a, b or tie
    winner, loser                the table that `diffalign pairs` reads
    image, rating                any numbers; images of equal `group` (without that column, of equal prompt) are compared

Images are named as for `--prompts`: by path (relative to the table too), by path below the source, by name or by stem.
"""

import itertools
import math
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from diffalign.data.tables import column_for, read_rows
from diffalign.errors import DiffalignError
from diffalign.intervals import Interval, bootstrap
from diffalign.scoring.captions import plain_path
from diffalign.scoring.run import Scores
from diffalign.scoring.score_summary import columns_of
from diffalign.terminal import number, plain_table

CHOICES = {"a": 1, "b": -1, "tie": 0}


@dataclass(frozen=True)
class Choice:
    """What people preferred: row a to row b (1), b to a (-1), or neither (0). group: what is resampled together."""

    a: int
    b: int
    human: int
    group: str


@dataclass(frozen=True)
class Agreement:
    """How far a reward agrees with people.

    pairs: those with a human preference and both scores. accuracy: share of correct ones, a predicted tie counts half;
    interval: its 95% interval over groups. kendall: tau-b, in which ties of either side reduce the denominator.
    """

    pairs: int
    human_ties: int
    predicted_ties: int
    accuracy: float
    interval: Interval
    kendall: float


def read_choices(path: Path, scores: Scores) -> list[Choice]:
    """Read the human choices of a labels file; only the items of `scores` are looked at.

    Raises DiffalignError for a table with other columns, an unknown image or an unknown choice.
    """
    index = _index(scores, path.parent)
    rows = list(read_rows(path))
    if not rows:
        raise DiffalignError(f"{path}: the table is empty")
    names = {meaning: column_for(meaning, rows[0][1]) for meaning in ("a", "b", "choice", "winner", "loser", "image")}
    a, b, choice, winner, loser, image = names.values()
    if a and b and choice:
        return [_pairwise(row, where, (a, b), choice, index, scores) for where, row in rows]
    if winner and loser:
        return [_pairwise(row, where, (winner, loser), None, index, scores) for where, row in rows]
    if image and "rating" in rows[0][1]:
        return _rated(rows, image, index, scores)
    found = ", ".join(map(str, rows[0][1]))
    raise DiffalignError(f"{path}: columns image_a, image_b, choice or image, rating are needed; there are {found}")


def _index(scores: Scores, folder: Path) -> dict[str, int | None]:
    """Return every way to name an image; None where a short name fits two. folder: paths may be relative to it."""
    index: dict[str, int | None] = {}
    exact: dict[str, int | None] = {}
    for i, item in enumerate(scores.items):
        exact |= {item.name: i, item.key: i}
        if item.path is not None:
            full = plain_path(item.path)
            exact |= {full: i, os.path.relpath(full, plain_path(folder)): i}
        for short in {PurePosixPath(item.key).name, PurePosixPath(item.key).stem}:
            index[short] = None if short in index else i
    return index | exact


def _row_of(name: object, where: str, index: dict[str, int | None]) -> int:
    found = index.get(name, index.get(os.path.normpath(name))) if isinstance(name, str) else None
    if found is None:
        fault = (
            "names more than one image; give its path"
            if isinstance(name, str) and name in index
            else "is none of the scored images"
        )
        raise DiffalignError(f"{where}: {name!r} {fault}")
    return found


def _pairwise(
    row: dict[str, Any],
    where: str,
    images: tuple[str, str],
    column: str | None,
    index: dict[str, int | None],
    scores: Scores,
) -> Choice:
    """Return the choice between two images; without a column of choices, the first is preferred."""
    choice = str(row.get(column)).strip().lower() if column else "a"
    if choice not in CHOICES:
        raise DiffalignError(f"{where}: choice {row.get(column or '')!r}; one of a, b, tie")
    a, b = (_row_of(row.get(name), where, index) for name in images)
    return Choice(a, b, CHOICES[choice], scores.items[a].prompt or where)


def _rated(
    rows: list[tuple[str, dict[str, Any]]], image: str, index: dict[str, int | None], scores: Scores
) -> list[Choice]:
    groups: dict[str, list[tuple[int, float]]] = {}
    for where, row in rows:
        try:
            rating = float(row["rating"])
        except (TypeError, ValueError, KeyError, OverflowError):
            rating = math.nan
        if not math.isfinite(rating):
            raise DiffalignError(f"{where}: rating {row.get('rating')!r} is not a number")
        i = _row_of(row.get(image), where, index)
        groups.setdefault(str(row.get("group") or scores.items[i].prompt or ""), []).append((i, rating))
    return [
        Choice(a, b, int(x > y) - int(x < y), group)
        for group, members in groups.items()
        for (a, x), (b, y) in itertools.combinations(members, 2)
    ]


def agree(choices: list[Choice], scores: Scores, column: str, seed: int = 0, resamples: int = 10_000) -> Agreement:
    """Return the agreement of one column; pairs without both scores are left out."""
    found = []
    for c in choices:
        a, b = scores.rows[c.a][column], scores.rows[c.b][column]
        if math.isfinite(a) and math.isfinite(b):
            found.append((c.human, int(a > b) - int(a < b), c.group))
    human, model = np.array([f[0] for f in found]), np.array([f[1] for f in found])
    decided = human != 0
    if not found or not decided.any():
        nothing = Interval(0, None, None)
        return Agreement(0, int((~decided).sum()), int((model == 0).sum()), math.nan, nothing, math.nan)
    right = np.where(model == 0, 0.5, human == model)[decided]
    untied = (human != 0) & (model != 0)
    concordant = float((human * model)[untied].sum())
    denominator = math.sqrt(float(decided.sum()) * float((model != 0).sum()))
    interval = _interval(right, [f[2] for f, kept in zip(found, decided, strict=True) if kept], seed, resamples)
    return Agreement(
        int(decided.sum()),
        int((~decided).sum()),
        int((model == 0).sum()),
        float(right.mean()),
        interval,
        concordant / denominator if denominator else math.nan,
    )


def _interval(right: np.ndarray, groups: list[str], seed: int, resamples: int) -> Interval:
    """Return the interval of the mean, resampling whole groups: pairs of one prompt share their images."""
    names = {name: n for n, name in enumerate(dict.fromkeys(groups))}
    place = np.array([names[g] for g in groups])
    sums_and_sizes = np.stack([np.bincount(place, right), np.bincount(place)], axis=1)
    share = lambda means: means[:, :1] / means[:, 1:]  # noqa: E731
    return bootstrap(sums_and_sizes, share, seed=seed, resamples=resamples)[0]


def agreement_table(choices: list[Choice], scores: Scores) -> Table:
    """Return every column's agreement as a table for a terminal."""
    names = ("pairs", "human\nties", "reward\nties", "accuracy", "95% interval", "Kendall\ntau-b")
    shown = plain_table("reward", *names, title=f"agreement with {len(choices)} human comparisons")
    for column in columns_of(scores):
        a = agree(choices, scores, column)
        counts = map(str, (a.pairs, a.human_ties, a.predicted_ties))
        shown.add_row(
            Text(column), *counts, number(a.accuracy, ".1%"), a.interval.words(".1%"), number(a.kendall, "+.3f")
        )
    return shown
