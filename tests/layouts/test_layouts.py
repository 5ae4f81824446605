"""What `score`, `data convert` and `pairs` make of each layout, as docs/data.md says in its table.

`PYTHONPATH=tests:. python tests/layouts/test_layouts.py` prints the table.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from diffalign.data.convert import import_pairs, open_rows
from diffalign.data.imported import Report, write_imported
from diffalign.errors import DiffalignError
from diffalign.files.images import Unreadable, decode
from diffalign.scoring.items import Item
from diffalign.scoring.sources import collect
from layouts.make import LAYOUTS, Layout, write

DOCS = Path(__file__).parents[2] / "docs" / "data.md"


def many(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def refused(command: Callable[[], str]) -> str:
    try:
        return command()
    except DiffalignError as error:
        assert "\n" not in str(error)
        return "one line"


def scored(given: list[Path]) -> str:
    def readable(item: Item) -> bool:
        try:
            decode(item.origin.read())
        except Unreadable:
            return False
        return True

    items = collect([str(path) for path in given])
    read = sum(map(readable, items))
    bad = f", {len(items) - read} with a reason" if read < len(items) else ""
    return f"{many(read, 'image')}{bad}, {many(sum(bool(item.prompt) for item in items), 'prompt')}"


def imported(report: Report) -> str:
    left_out = len(report.faults) + sum(report.counted.values())
    rows = f", {many(left_out, 'row')} left out" if left_out else ""
    return (
        many(report.groups, "group") + rows + (f", {many(n, 'image')} unlabelled" if (n := report.unlabelled) else "")
    )


def outcomes(layout: Layout, folder: Path) -> tuple[str, str, str]:
    given = write(layout, folder / "in")
    return (
        refused(lambda: scored(given)),
        refused(lambda: imported(write_imported(open_rows(given, None)[1], folder / "converted"))),
        refused(lambda: imported(import_pairs(given, folder / "pairs"))),
    )


def row(layout: Layout, found: tuple[str, str, str]) -> str:
    return f"| {layout.what} | {' | '.join(found)} |"


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(tmp_path: Path, name: str) -> None:
    assert row(LAYOUTS[name], outcomes(LAYOUTS[name], tmp_path)) in DOCS.read_text().splitlines()


def printed() -> Iterator[str]:
    yield "| layout | `score` | `data convert` | `pairs` |"
    yield "|---|---|---|---|"
    for layout in LAYOUTS.values():
        with tempfile.TemporaryDirectory() as folder:
            yield row(layout, outcomes(layout, Path(folder)))


if __name__ == "__main__":
    print("\n".join(printed()))
