"""Read tables that others wrote (a JSON list, JSON lines, csv, parquet), each row with its place in the file."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffalign.errors import DiffalignError
from diffalign.files import reading

Row = dict[str, Any]


def json_rows(path: Path) -> Iterator[tuple[str, Row | str]]:
    """Yield (place, row) of a JSON list or JSON lines; for a row that is no JSON object, what is wrong instead of the
    row.

    Raises DiffalignError for a file that cannot be read or is not JSON as a whole.
    """
    with reading(path):
        text = path.read_text(encoding="utf-8-sig")
    try:
        rows = None if path.suffix == ".jsonl" else json.loads(text)
    except ValueError as error:
        if text.lstrip()[:1] != "{":
            raise DiffalignError(f"{path}: not JSON ({error})") from error
        rows = None  # JSON lines under another name
    if rows is None:
        # Not splitlines(): it also breaks at U+2028, which JSON allows inside a string.
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield f"{path}:{number}", _object(line)
        return
    if not isinstance(rows, list):
        raise DiffalignError(f"{path}: a list of rows is expected, not a {type(rows).__name__}")
    for number, row in enumerate(rows):
        yield (
            f"{path}[{number}]",
            row if isinstance(row, dict) else f"an object is expected, not {type(row).__name__}",
        )


def csv_rows(path: Path, needed: set[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (file:line, row) of a csv; cells are stripped, empty ones are "".

    Raises DiffalignError for a file that cannot be read, is not UTF-8, or lacks one of the columns `needed`.
    """
    for where, row in _csv_rows(path, needed):
        yield where, {k: (v or "").strip() for k, v in row.items() if isinstance(k, str)}


def read_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield (place, row) of a .jsonl, .csv or .parquet file, with cells unchanged.

    Raises DiffalignError with file and line for the first row that cannot be read.
    """
    if path.suffix == ".parquet":
        try:
            with reading(path):
                rows = pq.read_table(path).to_pylist()
        except pa.ArrowInvalid as error:
            raise DiffalignError(f"{path}: cannot be read as a table: {error}") from error
        yield from ((f"{path} row {number}", row) for number, row in enumerate(rows))
    elif path.suffix == ".csv":
        yield from _csv_rows(path, strict=True)
    elif path.suffix == ".jsonl":
        for where, found in json_rows(path):
            if isinstance(found, str):
                raise DiffalignError(f"{where}: {found}")
            yield where, found
    else:
        raise DiffalignError(f"{path}: unknown kind of table; use .jsonl, .csv or .parquet")


def _csv_rows(path: Path, needed: set[str] | None = None, strict: bool = False) -> Iterator[tuple[str, Row]]:
    try:
        with reading(path), path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, strict=strict)
            missing = (needed or set()) - set(reader.fieldnames or [])
            if missing:
                raise DiffalignError(
                    f"{path}:1: column {', '.join(sorted(missing))} is missing; {', '.join(sorted(needed or ()))} are needed"
                )
            for row in reader:
                yield f"{path}:{reader.line_num}", dict(row)
    except csv.Error as error:
        raise DiffalignError(f"{path}: cannot be read as a table: {error}") from error


def _object(line: str) -> Row | str:
    try:
        row = json.loads(line)
    except ValueError as error:
        return f"not JSON ({error})"
    return row if isinstance(row, dict) else f"an object is expected, not {type(row).__name__}"
