"""JSON files of rows: one list, or one object a line."""

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


def _object(line: str) -> dict[str, Any] | str:
    try:
        row = json.loads(line)
    except ValueError as error:
        return f"not JSON ({error})"
    return row if isinstance(row, dict) else f"an object is expected, not {type(row).__name__}"
