"""Rows of metrics.jsonl: numbers by name, where JSON has null for a number that is not finite."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from diffalign.errors import DiffalignError
from diffalign.files import read_json_lines


def plain_row(row: Mapping[str, float]) -> dict[str, float | None]:
    """Return a row as JSON has it."""
    return {name: value if math.isfinite(value) else None for name, value in row.items()}


def numbers(row: Mapping[str, float | None]) -> dict[str, float]:
    """Return a row from JSON, with NaN for null."""
    return {name: math.nan if value is None else value for name, value in row.items()}


def metrics_line(row: Mapping[str, float]) -> str:
    """Return a row as its line in the file."""
    return json.dumps(plain_row(row), allow_nan=False) + "\n"


def read_metrics(path: Path, last_step: int | None = None) -> list[dict[str, float]]:
    """Return the rows of metrics.jsonl, as `read_json_lines` reads them, with NaN for null.

    Raises DiffalignError where a value is neither a number nor null.
    """
    rows = read_json_lines(path, last_step)
    for row in rows:
        for name, value in row.items():
            if value is not None and not isinstance(value, int | float):
                what = f"{path}: {name} of step {row['step']} is {value!r}, no number"
                raise DiffalignError(f"{what}; delete this line")
    return [numbers(row) for row in rows]
