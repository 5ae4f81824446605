"""Compare two sets of images of the same prompts: paired win rates with intervals."""

import math
from dataclasses import dataclass

import numpy as np
from rich.table import Table

from diffalign.evaluation.compare import Comparison, compare
from diffalign.scoring.pairing import Pairing
from diffalign.scoring.run import Scores
from diffalign.scoring.score_summary import columns_of
from diffalign.terminal import counted, name_cell, number, plain_table


def compare_scores(a: Scores, b: Scores, pairing: Pairing, seed: int = 0) -> dict[str, Comparison]:
    """Return column -> comparison, with A as the base. Columns in which no pair has both scores are left out."""
    widest = max(len(pairs) for pairs in pairing.prompts)
    found = {}
    for column in columns_of(a):
        sides = np.full((2, len(pairing.prompts), widest), np.nan)
        for p, pairs in enumerate(pairing.prompts):
            for k, (i, j) in enumerate(pairs):
                sides[:, p, k] = a.rows[i][column], b.rows[j][column]
        if np.isfinite(sides).all(axis=0).any():
            found[column] = compare(sides[0], sides[1], seed=seed)
    return found


@dataclass(frozen=True)
class Outcome:
    """What one reward says of B against A. wins and ties are pairs; comparison: None where no pair has both scores."""

    a_wins: int
    b_wins: int
    ties: int
    unscored: int
    comparison: Comparison | None

    @property
    def winner(self) -> str:
        """ "A" or "B" where the difference's interval excludes 0 and the win rate's does not contradict it, else ""."""
        if self.comparison is None:
            return ""
        side, wins = self.comparison.interval.side(), self.comparison.win_interval.side(0.5)
        return {1: "B", -1: "A", 0: ""}[side if side * wins >= 0 else 0]

    @property
    def verdict(self) -> str:
        """Who wins, in words."""
        if self.comparison is None:
            return "no pair has both scores"
        higher, lower = ("B", "A") if self.comparison.difference > 0 else ("A", "B")
        if self.comparison.interval.side() and not self.winner:
            return f"undecided: {higher} scores higher on average, but {lower} wins more often"
        return self.comparison.interval.verdict("B wins", "A wins")

    def counts(self) -> str:
        """Return how many pairs each side wins."""
        unscored = f", {counted(self.unscored, 'pair')} without both scores" if self.unscored else ""
        return f"A wins {self.a_wins}, B wins {self.b_wins}, {counted(self.ties, 'tie')}{unscored}"


def outcomes(a: Scores, b: Scores, pairing: Pairing, seed: int = 0) -> dict[str, Outcome]:
    """Return column -> what it says of B against A. A reward that scored no pair has its first column alone."""
    compared = compare_scores(a, b, pairing, seed)
    found = {}
    for column in columns_of(a):
        if column not in compared and column not in a.columns:
            continue
        sides = [(a.rows[i][column], b.rows[j][column]) for prompt in pairing.prompts for i, j in prompt]
        signs = [int(y > x) - int(y < x) for x, y in sides if math.isfinite(x) and math.isfinite(y)]
        counts = (signs.count(-1), signs.count(1), signs.count(0), len(sides) - len(signs))
        found[column] = Outcome(*counts, compared.get(column))
    return found


def comparison_table(found: dict[str, Outcome]) -> Table:
    """Return B against A as a table for a terminal, each interval below what it belongs to."""
    shown = plain_table("reward", "A", "B", "difference\n95% interval", "B wins\n95% interval")
    for column, outcome in found.items():
        c = outcome.comparison
        if c is None:
            continue  # the verdict says so
        share = f"{c.win_rate:.1%}" + ("" if c.win_interval.low is None else f"\n{c.win_interval.words('.1%')}")
        change = f"{c.difference:+.4f}\n{c.interval.words('+.4f')}"
        shown.add_row(name_cell(column), number(c.base), number(c.tuned), change, share)
    return shown


def verdict_lines(found: dict[str, Outcome]) -> list[str]:
    """Return a line for each reward: who wins, how many pairs, over how many prompts."""
    return [
        f"{column}: {outcome.verdict}"
        + (f" ({outcome.counts()}; {counted(outcome.comparison.prompts, 'prompt')})" if outcome.comparison else "")
        for column, outcome in found.items()
    ]
