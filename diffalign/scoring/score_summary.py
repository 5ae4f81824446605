"""Summarise scores: mean, spread, best and worst, counts for a histogram."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rich.table import Table
from rich.text import Text

from diffalign.rewards import Reward
from diffalign.scoring.run import Scores

BINS = 24
ALIKE = 3
"""So many images with one reason get a line each; more share one."""


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


def summary_table(scores: Scores) -> Table:
    """Return the summaries as a table for a terminal. Names and prompts are text, never markup."""
    shown = Table(title=f"{len(scores.rows)} images", title_justify="left")
    shown.add_column("reward")
    for name in ("scored", "not", "mean", "spread"):
        shown.add_column(name, justify="right")
    for name in ("best", "worst"):
        shown.add_column(name, overflow="fold", ratio=1)
    for s in summarise(scores):
        ends = [Text(f"{value:.4g} {_short(name)}") if name else Text("") for value, name in (s.best, s.worst)]
        numbers = [str(s.scored), str(s.unscored) if s.unscored else "", f"{s.mean:.4f}", f"{s.spread:.4f}"]
        shown.add_row(Text(s.column), *numbers, *ends)
    return shown


def _short(name: str, longest: int = 40) -> str:
    clean = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
    return clean if len(clean) <= longest else "…" + clean[1 - longest :]


def cut_lines(rewards: Mapping[str, Reward], prompts: Sequence[str | None]) -> list[str]:
    """Return a line for each reward (label -> reward) that reads some of the prompts in part only."""
    given = list(dict.fromkeys(prompt for prompt in prompts if prompt))
    counts = {label: reward.count_cut(given) for label, reward in rewards.items()}
    return [
        f"{label} reads {rewards[label].longest} tokens of a prompt: {count} of {len(given)} prompts are longer and were cut"
        for label, count in counts.items()
        if count
    ]


def faults(scores: Scores, most: int = 10) -> list[str]:
    """Return a line for each image without a score, or one for a reason that many share; the first `most` of them."""
    images: dict[str, list[str]] = {}
    for row in scores.rows:
        reasons = {row["reason"]} if row["reason"] else {row[f"{label}.reason"] for label in scores.columns}
        reasons |= {"not scored" for label in scores.columns if not math.isfinite(row[label]) and reasons == {""}}
        for reason in sorted(r for r in reasons if r):
            images.setdefault(reason, []).append(_short(row["image"], 80))
    lines = []
    for reason, names in images.items():
        if len(names) > ALIKE:
            lines.append(f"{len(names)} images, the first {names[0]}: {reason}")
        else:
            lines += [f"{name}: {reason}" for name in names]
    more = [f"... and {len(lines) - most} more"] if len(lines) > most else []
    return lines[:most] + more
