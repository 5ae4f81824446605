"""Compare two sets of images of the same prompts: paired win rates with intervals."""

from dataclasses import dataclass

import numpy as np
from rich.table import Table

from diffalign.errors import DiffalignError
from diffalign.evaluation.compare import Comparison, compare
from diffalign.scoring.run import Scores
from diffalign.scoring.score_summary import columns_of


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
    """Pair images of equal names below their folders, and of equal prompts in the order of names if no name agrees.

    A name with different prompts on the two sides tells nothing: such images are paired by prompt.

    Raises DiffalignError if nothing can be paired.
    """
    by_key = {item.key: i for i, item in enumerate(b.items)}
    named = [(i, by_key[item.key]) for i, item in enumerate(a.items) if item.key in by_key]
    pairs = [(i, j) for i, j in named if len({a.items[i].prompt, b.items[j].prompt} - {None}) < 2]
    other_prompt = len(named) - len(pairs)
    how = "name"
    if not pairs or other_prompt:
        how = "name or prompt" if pairs else "prompt"
        ours, theirs = {i for i, _ in pairs}, {j for _, j in pairs}
        waiting: dict[str, list[int]] = {}
        for j, item in enumerate(b.items):
            if item.prompt and j not in theirs:
                waiting.setdefault(item.prompt, []).append(j)
        for i, item in enumerate(a.items):
            if i not in ours and item.prompt and waiting.get(item.prompt):
                pairs.append((i, waiting[item.prompt].pop(0)))
    if not pairs:
        raise DiffalignError("--against: no image has the same name or the same prompt on both sides")
    # Images of one prompt are not independent, so the interval resamples prompts.
    prompts: dict[str, list[tuple[int, int]]] = {}
    for i, j in pairs:
        prompts.setdefault(a.items[i].prompt or a.items[i].name, []).append((i, j))
    return Pairing(how, list(prompts.values()), len(a.items) + len(b.items) - 2 * len(pairs), other_prompt)


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


def heading(pairing: Pairing, names: tuple[str, str]) -> str:
    """Return one line that says what is compared."""
    pairs = sum(len(p) for p in pairing.prompts)
    alone = f", {pairing.unpaired} images without a partner" if pairing.unpaired else ""
    other = f", {pairing.other_prompt} equal names with different prompts" if pairing.other_prompt else ""
    return f"A {names[0]} against B {names[1]}: {pairs} pairs by {pairing.how}{other}{alone}"


def comparison_table(found: dict[str, Comparison]) -> Table:
    """Return B against A as a table for a terminal."""
    shown = Table()
    for name in ("reward", "prompts", "A", "B", "difference", "95% interval", "B wins", "95% interval"):
        shown.add_column(name, justify="left" if name == "reward" else "right")
    for column, c in found.items():
        shown.add_row(
            column,
            str(c.prompts),
            f"{c.base:.4f}",
            f"{c.tuned:.4f}",
            f"{c.difference:+.4f}",
            c.interval.words("+.4f"),
            f"{c.win_rate:.1%}",
            c.win_interval.words(".1%"),
        )
    return shown
