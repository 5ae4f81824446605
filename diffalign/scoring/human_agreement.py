"""Measure how often a reward and people choose the same image.

Labels are a table in any form that `diffalign pairs` reads (`diffalign.data.read_tables`), such as image_a, image_b and
choice, or winner and loser; ties count here. Or it has

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

from diffalign.agreement import Agreement, agreement
from diffalign.data.imported import finite_number
from diffalign.data.read_tables import is_table_of_pairs, judged
from diffalign.data.tables import column_for, read_rows
from diffalign.errors import DiffalignError
from diffalign.files.paths import member_name
from diffalign.scoring.captions import plain_path
from diffalign.scoring.run import Scores
from diffalign.scoring.score_summary import columns_of
from diffalign.scoring.vote_labels import vote_rows
from diffalign.terminal import name_cell, number, plain_table


@dataclass(frozen=True)
class Choice:
    """What people preferred: row a to row b (1), b to a (-1), or neither (0). group: what is resampled together."""

    a: int
    b: int
    human: int
    group: str


def read_choices(path: Path, scores: Scores) -> list[Choice]:
    """Read the human choices of a labels file, or of a log of votes; only the items of `scores` are looked at.

    Raises DiffalignError for a table with other columns, an unknown image or an unknown choice.
    """
    voted = vote_rows(path, scores.items)
    folder, rows = voted if voted is not None else (path.parent, list(read_rows(path)))
    images = _Images(scores, folder)
    if not rows:
        raise DiffalignError(f"{path}: " + ("the table is empty" if voted is None else "no vote prefers an image"))
    first = rows[0][1]
    image, rating = column_for("image", first), column_for("rating", first)
    if is_table_of_pairs(first):
        choices = [choice for where, row in rows for choice in _choices(row, where, images)]
    elif image and rating:
        choices = _rated(rows, image, rating, images)
    else:
        found = ", ".join(map(str, first))
        raise DiffalignError(
            f"{path}: columns image_a, image_b, choice, or winner, loser, or image, rating are needed; there are {found}"
        )
    if not choices:
        raise DiffalignError(
            f"{path}: none of its {len(rows)} rows compares two images; see docs/score.md for the forms"
        )
    return choices


class _Images:
    """The scored images, found by any of their names. folder: paths may be relative to it."""

    def __init__(self, scores: Scores, folder: Path) -> None:
        self.items, self.folder = scores.items, folder
        self.in_dataset = any(item.group is not None for item in scores.items)
        short: dict[str, int | None] = {}
        exact: dict[str, int | None] = {}
        for i, item in enumerate(scores.items):
            exact |= {item.name: i, item.key: i}
            # An image in a container has a path too, as the log of votes names it.
            exact[plain_path(Path(item.name) if item.path is None else item.path)] = i
            if item.group is not None:
                exact[f"{member_name(item.group[0])}/{item.group[1]}"] = i
            for name in {PurePosixPath(item.key).name, PurePosixPath(item.key).stem}:
                short[name] = None if name in short else i
        self.index = short | exact

    def find(self, cell: object, where: str) -> int:
        """Return the image that a cell names. Raises DiffalignError for none, and for a short name of two."""
        given = cell.get("path") if isinstance(cell, dict) else cell
        name = given.strip() if isinstance(given, str) else ""
        # As `pairs` reads it: a path is relative to the table before anything else.
        ways: list[str] = []
        if name:
            ways = [plain_path(self.folder / name), name, os.path.normpath(name), plain_path(Path(name))]
        if self.in_dataset:  # the export of votes copies a dataset's images to group/index.png
            stem = name.removesuffix(PurePosixPath(name).suffix)
            ways.append("/".join(PurePosixPath(stem).parts[-2:]))
        found = next((self.index[way] for way in ways if self.index.get(way) is not None), None)
        if found is None:
            twice = any(way in self.index for way in ways)
            fault = "names more than one image; give its path" if twice else "is none of the scored images"
            shown = "a cell with image bytes" if isinstance(cell, bytes | dict) else repr(cell)
            raise DiffalignError(f"{where}: {shown} {fault}")
        return found


def _choices(row: dict[str, Any], where: str, images: _Images) -> list[Choice]:
    """Return what a row says of every two of its images."""
    try:
        said = judged(row)
    except DiffalignError as error:
        raise DiffalignError(f"{where}: {error}") from error
    places = [images.find(cell, where) for _, cell in said.images]
    if len(set(places)) < len(places):
        raise DiffalignError(f"{where}: the same image stands in it twice")
    group = images.items[places[0]].prompt or _prompt(row) or where
    return [
        Choice(a, b, int(x > y) - int(x < y), group)
        for (a, x), (b, y) in itertools.combinations(zip(places, said.preference, strict=False), 2)
        if math.isfinite(x) and math.isfinite(y)
    ]


def _prompt(row: dict[str, Any]) -> str:
    column = column_for("prompt", row)
    return str(row.get(column) or "") if column else ""


def _rated(rows: list[tuple[str, dict[str, Any]]], image: str, column: str, images: _Images) -> list[Choice]:
    groups: dict[str, list[tuple[int, float]]] = {}
    by = column_for("group", rows[0][1])
    for where, row in rows:
        rating = finite_number(row.get(column))
        if rating is None:
            raise DiffalignError(f"{where}: {column} {row.get(column)!r} is not a number")
        i = images.find(row.get(image), where)
        group = str(row.get(by) or "") if by else ""
        groups.setdefault(group or images.items[i].prompt or _prompt(row), []).append((i, rating))
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
    human, model = (np.array([f[n] for f in found], dtype=np.int64) for n in (0, 1))
    unit = "prompts" if all(scores.items[c.a].prompt for c in choices) else "groups"
    return agreement(human, model, [f[2] for f in found], unit, seed, resamples)


def agreement_table(choices: list[Choice], scores: Scores) -> Table:
    """Return every column's agreement as a table for a terminal."""
    names = ("pairs", "human\nties", "reward\nties", "accuracy", "95% interval", "Kendall\ntau-b")
    shown = plain_table("reward", *names, title=f"agreement with {len(choices)} human comparisons")
    for column in columns_of(scores):
        a = agree(choices, scores, column)
        counts = map(str, (a.pairs, a.human_ties, a.predicted_ties))
        shown.add_row(
            name_cell(column), *counts, number(a.accuracy, ".1%"), a.interval.words(".1%"), number(a.kendall, "+.3f")
        )
    return shown
