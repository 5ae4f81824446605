"""Summarise scores: mean, spread, best and worst, counts for a histogram."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Group
from rich.table import Table

from diffalign.progress import visible
from diffalign.scoring.run import Scores
from diffalign.terminal import NameCell, name_cell, plain_table, shortened

BINS = 24


@dataclass(frozen=True)
class Summary:
    """The summary of one column. spread: standard deviation over images. best, worst: (score, name)."""

    column: str
    scored: int
    unscored: int
    mean: float
    spread: float
    best: tuple[float, str]
    worst: tuple[float, str]
    counts: tuple[int, ...]
    edges: tuple[float, float]


def columns_of(scores: Scores) -> list[str]:
    """Return every column to be summarised, each label's score before its others.

    Bins of a distribution (`alignment@4.5`) are in the output only: a reward may have dozens.
    """
    return [
        label if k == 0 else f"{label}.{name}"
        for label, names in scores.columns.items()
        for k, name in enumerate(names)
        if "@" not in name
    ]


def summarise(scores: Scores) -> list[Summary]:
    """Return a summary of every column; NaN and empty names where nothing was scored."""
    return [_summary(scores, column) for column in columns_of(scores)]


def _summary(scores: Scores, column: str) -> Summary:
    values = np.array([row[column] for row in scores.rows], dtype=np.float64)
    known = np.flatnonzero(np.isfinite(values))
    if not len(known):
        nothing = (math.nan, "")
        return Summary(column, 0, len(values), math.nan, math.nan, nothing, nothing, (0,) * BINS, (0.0, 1.0))
    found = values[known]
    best, worst = known[found.argmax()], known[found.argmin()]
    low, high = float(found.min()), float(found.max())
    counts, _ = np.histogram(found, bins=BINS, range=(low, high if high > low else low + 1))
    named = [(float(values[i]), str(scores.rows[i]["image"])) for i in (best, worst)]
    return Summary(
        column,
        len(found),
        len(values) - len(found),
        float(found.mean()),
        float(found.std()),
        named[0],
        named[1],
        tuple(int(c) for c in counts),
        (low, high),
    )


def summary_table(found: list[Summary], title: str) -> Table:
    """Return summaries as a table for a terminal. Names and prompts are text, never markup.

    A column without any score has no row: `faults` says why.
    """
    shown = plain_table("reward", "scored", "mean", "std", title=title)
    shown.add_column("best\nworst", overflow="fold")
    for s in found:
        if s.scored:
            count = f"{s.scored} of {s.scored + s.unscored}" if s.unscored else str(s.scored)
            ends = Group(*(NameCell(f"{value:.4g}", name) for value, name in (s.best, s.worst)))
            shown.add_row(name_cell(s.column), count, f"{s.mean:.4f}", f"{s.spread:.4f}", ends)
    return shown


def faults(scores: Scores, most: int = 10) -> list[str]:
    """Return a line for each reason why images have no score, with their number; the `most` frequent ones.

    The reason names the reward where there are several.
    """
    images: dict[str, list[str]] = {}
    for row in scores.rows:
        for reason in _reasons(row, scores):
            images.setdefault(visible(reason), []).append(row["image"])
    lines = [
        f"{len(names)} x {reason}; the first is {name}" if len(names) > 1 else f"{name}: {reason}"
        for reason, names in sorted(images.items(), key=lambda one: -len(one[1]))
        for name in [shortened(visible(names[0]), 80)]
    ]
    return lines[:most] + ([f"... and {len(lines) - most} more reasons"] if len(lines) > most else [])


def _reasons(row: dict[str, Any], scores: Scores) -> list[str]:
    """Return why an image has no score: why it cannot be read, or what each of its rewards said."""
    if row["reason"]:
        return [row["reason"]]
    said = [
        (label, row[f"{label}.reason"] or ("" if math.isfinite(row[label]) else "not scored"))
        for label in scores.columns
    ]
    several = len(scores.columns) > 1
    return [f"{label}: {reason}" if several else reason for label, reason in said if reason]
