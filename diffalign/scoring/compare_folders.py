"""Compare two sets of images of the same prompts: paired win rates with intervals."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
from rich.table import Table

from diffalign.errors import DiffalignError
from diffalign.evaluation.compare import Comparison, compare
from diffalign.scoring.items import Item
from diffalign.scoring.run import Scores
from diffalign.scoring.score_summary import columns_of
from diffalign.terminal import counted, name_cell, number, plain_table


@dataclass(frozen=True)
class Pairing:
    """Rows of A and B that belong together, by prompt.

    how: "name", "prompt" or "name or prompt". unpaired: images left over. other_prompt: images whose name is on both
    sides with different prompts; the prompt counts for them.
    """

    how: str
    prompts: list[list[tuple[int, int]]]
    unpaired: int
    other_prompt: int = 0


def pair_up(a: Scores, b: Scores) -> Pairing:
    """Pair images of equal names below their folders, and of equal prompts in the order of names where no name agrees.

    The kind of file does not matter, nor do folders where a file's own name is unique on both sides. A name with
    different prompts on the two sides tells nothing: such images are paired by prompt.

    Raises DiffalignError if nothing can be paired.
    """
    named = _by_name(a.items, b.items)
    pairs = {i: j for i, j in named.items() if len({a.items[i].prompt, b.items[j].prompt} - {None}) < 2}
    other_prompt, by_name, taken = len(named) - len(pairs), len(pairs), set(pairs.values())
    waiting: dict[str, list[int]] = {}
    for j, item in enumerate(b.items):
        if item.prompt and j not in taken:
            waiting.setdefault(item.prompt, []).append(j)
    for i, item in enumerate(a.items):
        if i not in pairs and item.prompt and waiting.get(item.prompt):
            pairs[i] = waiting[item.prompt].pop(0)
    if not pairs:
        raise DiffalignError("--against: no image has the same name or the same prompt on both sides")
    both = "name or prompt" if other_prompt or len(pairs) > by_name else "name"
    # Images of one prompt are not independent, so the interval resamples prompts.
    prompts: dict[str, list[tuple[int, int]]] = {}
    for i, j in pairs.items():
        prompts.setdefault(a.items[i].prompt or b.items[j].prompt or a.items[i].name, []).append((i, j))
    unpaired = len(a.items) + len(b.items) - 2 * len(pairs)
    return Pairing(both if by_name else "prompt", list(prompts.values()), unpaired, other_prompt)


def _by_name(a: list[Item], b: list[Item]) -> dict[int, int]:
    """Return a row of B for each row of A of the same name: as it is, without its suffix, then without its folders.

    Equal names on one side, as those of two folders, are paired in their order if both sides have as many. Only names of
    files are shortened, and only where the rest is unique on both sides: rows of tables and datasets have numbers.
    """
    found: dict[int, int] = {}
    ways: tuple[tuple[Callable[[str], str], float], ...] = ((str, math.inf), (_stem, 1), (_file_stem, 1))
    for name, most in ways:
        sides: list[dict[str, list[int]]] = [{}, {}]
        for side, items, used in zip(sides, (a, b), (set(found), set(found.values())), strict=True):
            for i, item in enumerate(items):
                if i not in used and (most > 1 or item.path is not None):
                    side.setdefault(name(item.key), []).append(i)
        for key, rows in sides[0].items():
            if len(rows) == len(sides[1].get(key, ())) <= most:
                found |= zip(rows, sides[1][key], strict=True)
    return dict(sorted(found.items()))


def _stem(key: str) -> str:
    return key.removesuffix(PurePosixPath(key).suffix)


def _file_stem(key: str) -> str:
    return PurePosixPath(key).stem


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


def heading(pairing: Pairing) -> str:
    """Return what is compared: how many pairs, how they were found, and what was left out."""
    pairs = sum(len(p) for p in pairing.prompts)
    alone = f", {counted(pairing.unpaired, 'image')} without a partner" if pairing.unpaired else ""
    other = f", {counted(pairing.other_prompt, 'equal name')} with different prompts" if pairing.other_prompt else ""
    prompts = counted(len(pairing.prompts), "prompt")
    return f"{counted(pairs, 'pair')} by {pairing.how}, {prompts}{other}{alone}"


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
