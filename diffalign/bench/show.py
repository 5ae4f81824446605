"""Print the list of suites, and two results beside each other."""

from __future__ import annotations

from pathlib import Path

from diffalign.bench.results import compare
from diffalign.bench.suites import SUITES
from diffalign.progress import say
from diffalign.terminal import plain_table, show_table


def show_suites() -> None:
    """Print the suites: `diffalign bench suites`."""
    shown = plain_table(
        "suite", "prompts", "images\neach", title="What each draws and how its scores are formed: docs/bench.md"
    )
    shown.add_column("judges")
    shown.add_column("prompts from", overflow="fold")
    for suite in SUITES.values():
        judges = ", ".join(judge.label for judge in suite.judges)
        shown.add_row(suite.name, str(suite.published), str(suite.images_per_prompt), judges, suite.where)
    show_table(shown)


def compare_results(first: Path, second: Path) -> None:
    """Print B against A: `diffalign bench compare`."""
    tables, lines = compare(first, second)
    for table in tables:
        show_table(table)
    for line in lines:
        say(line)
