"""The scores of images as Python code gets them: columns by name, in the order of the images."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console

from diffalign.errors import DiffalignError
from diffalign.progress import visible
from diffalign.scoring.run import Scores
from diffalign.scoring.score_summary import faults, summarise, summary_table
from diffalign.scoring.store import IDENTITY
from diffalign.terminal import counted, name_cell, plain_table

if TYPE_CHECKING:
    from pandas import DataFrame

SHOWN = 10
WIDTH = 100


class ScoreTable(Mapping[str, list[Any]]):
    """Scores by column; each column is a list with one entry an image, in the order in which the images were given.

    image: the name. sha256: of the file's bytes; of an image in memory, of its pixels. prompt: the text or None. reason: why
    the image could not be read, else "". For every reward LABEL (its score, a float), LABEL.COLUMN (further columns) and
    LABEL.reason (why there is no score, else ""). A missing score is NaN and never 0. A column is typed Any since floats
    and texts are told apart by its name.
    """

    def __init__(self, scores: Scores) -> None:
        self._scores = scores
        names = [name for name in scores.rows[0] if not name.endswith(IDENTITY)] if scores.rows else []
        self._columns = {name: [row[name] for row in scores.rows] for name in names}

    def __getitem__(self, name: str) -> list[Any]:
        return self._columns[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        """Return the number of columns, as of any mapping; `rows` has the images."""
        return len(self._columns)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The images, one dict each, as a line of the file that `diffalign score -o` writes."""
        return [{name: row[name] for name in row} for row in self._scores.rows]

    @property
    def labels(self) -> list[str]:
        """The names of the columns that hold each reward's score."""
        return list(self._scores.columns)

    @property
    def failed(self) -> int:
        """How many images lack a score of at least one reward."""
        return self._scores.failed

    @property
    def means(self) -> dict[str, float]:
        """The mean of each reward's scores over the images that have one; NaN where none has."""
        return {one.column: one.mean for one in summarise(self._scores) if one.column in self._scores.columns}

    @property
    def faults(self) -> list[str]:
        """Why images have no score: a line for each reason, with the number of images."""
        return faults(self._scores)

    def to_pandas(self) -> DataFrame:
        """Return a DataFrame with these columns and a row an image. Raises DiffalignError without pandas."""
        try:
            import pandas
        except ModuleNotFoundError as error:
            raise DiffalignError("to_pandas: pandas is not installed; pip install pandas") from error
        return pandas.DataFrame(self._columns)

    def __repr__(self) -> str:
        rows, labels = self._scores.rows, list(self._scores.columns)
        stream = io.StringIO()
        console = Console(file=stream, width=WIDTH, color_system=None, highlight=False)
        console.print(
            summary_table([one for one in summarise(self._scores) if one.column in labels], counted(len(rows), "image"))
        )
        first = plain_table("image", *labels)
        for row in rows[:SHOWN]:
            numbers = (f"{row[label]:.4f}" if math.isfinite(row[label]) else "–" for label in labels)
            first.add_row(name_cell(visible(row["image"])), *numbers)
        console.print(first)
        left = [f"... and {len(rows) - SHOWN} more"] if len(rows) > SHOWN else []
        lines = [*stream.getvalue().splitlines(), *left, *(f"not scored: {line}" for line in self.faults)]
        return "\n".join(line.rstrip() for line in lines)
