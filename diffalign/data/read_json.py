"""Tables of rows: a JSON list, JSON lines, or csv, each row with its place."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffalign.errors import DiffalignError


def entries(path: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """(place, row) of each row; where a row is no JSON object, what is wrong with it instead.

    Raises DiffalignError for a file that cannot be read or is no JSON as a whole.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DiffalignError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DiffalignError(f"{path}: not UTF-8 at byte {error.start}") from error
    try:
        rows = None if path.suffix == ".jsonl" else json.loads(text)
    except ValueError as error:
        if text.lstrip()[:1] != "{":
            raise DiffalignError(f"{path}: not JSON ({error})") from error
        rows = None  # JSON lines under another name
    if rows is None:
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                yield f"{path}:{number}", _object(line)
        return
    if not isinstance(rows, list):
        raise DiffalignError(f"{path}: a list of rows is expected, not a {type(rows).__name__}")
    for number, row in enumerate(rows):
        yield f"{path}[{number}]", row if isinstance(row, dict) else f"an object is expected, not {type(row).__name__}"


def csv_rows(path: Path, needed: set[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """(file:line, row) of a csv; empty cells are "". DiffalignError: unreadable, not UTF-8, a column missing."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            missing = needed - set(reader.fieldnames or [])
            if missing:
                raise DiffalignError(
                    f"{path}:1: column {', '.join(sorted(missing))} is missing; {', '.join(sorted(needed))} are needed"
                )
            for row in reader:
                yield f"{path}:{reader.line_num}", {k: (v or "").strip() for k, v in row.items() if isinstance(k, str)}
    except OSError as error:
        raise DiffalignError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DiffalignError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from error
    except csv.Error as error:
        raise DiffalignError(f"{path}: no csv ({error})") from error


def _object(line: str) -> dict[str, Any] | str:
    try:
        row = json.loads(line)
    except ValueError as error:
        return f"not JSON ({error})"
    return row if isinstance(row, dict) else f"an object is expected, not {type(row).__name__}"
