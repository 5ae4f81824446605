"""Print the list of suites, and two results beside each other."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from diffalign.bench.results import compare
from diffalign.bench.suites import SUITES
from diffalign.progress import say
from diffalign.terminal import WordsCell, plain_table, show_table


def suites_table() -> Table:
    """Return what each suite draws, what judges it, and where its prompts are to be had."""
    shown = plain_table(
        "suite", "prompts", "images\neach", title="What each draws and how its scores are formed: docs/bench.md"
    )
    shown.add_column("judges")
    shown.add_column("prompts from")
    for suite in SUITES.values():
        judges = ", ".join(judge.label for judge in suite.judges)
        shown.add_row(suite.name, str(suite.published), str(suite.images_per_prompt), judges, WordsCell(suite.where))
    return shown


def show_suites() -> None:
    """Print the suites: `diffalign bench suites`."""
    show_table(suites_table())


def compare_results(first: Path, second: Path) -> None:
    """Print B against A: `diffalign bench compare`."""
    tables, lines = compare(first, second)
    for table in tables:
        show_table(table)
    for line in lines:
        say(line)
