"""GenEval's evaluation_metadata.jsonl for images in one folder: rows that name no image, found by prompt or number."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffalign.data.folder_metadata import Caption, caption_of, named_image
from diffalign.data.tables import read_rows
from diffalign.errors import DiffalignError
from diffalign.files.facts import geneval_facts

GENEVAL_FILE = "evaluation_metadata.jsonl"


class NumberedRows:
    """GenEval's rows in their order. An image belongs to the row with its prompt, or if it has none, to that with its number.

    The number is the digits with which its name begins, or the first folder below the one that is scored, counted from 0
    as GenEval's own folders are: 00012.png, 00012_3.png and 00012/samples/0003.png belong to the thirteenth row.
    """

    def __init__(self, path: Path, column: str | None) -> None:
        self.path = path
        self.rows = [caption_of(row, where, column) for where, row in read_rows(path)]
        self._by_prompt = {row.prompt.strip(): n for n, row in reversed(list(enumerate(self.rows))) if row.prompt}
        self._used: set[int] = set()

    def find(self, key: str, prompt: str | None) -> Caption | None:
        """Return the row of an image by its prompt, or by its name below the folder; None if it has neither.

        Raises DiffalignError for a number that no row has.
        """
        number = self._by_prompt.get(prompt.strip()) if prompt else self._number(key)
        if number is None:
            return None
        self._used.add(number)
        return self.rows[number]

    def _number(self, key: str) -> int | None:
        digits = re.match(r"[0-9]+", key)
        if digits is None:
            return None
        if int(digits[0]) >= len(self.rows):
            raise DiffalignError(
                f"{key}: {self.path} has {len(self.rows)} rows, counted from 0; name the images by their row, or write "
                "a.txt beside a.png"
            )
        return int(digits[0])

    def unused(self) -> str:
        """Return a line about rows without an image, "" if all have one. Raises DiffalignError if none has."""
        rest = [n for n in range(len(self.rows)) if n not in self._used]
        if rest and not self._used:
            raise DiffalignError(
                f"--prompts {self.path}: none of its {len(rest)} rows belongs to an image; names begin with the row's number, "
                "as 00012.png, or an image's prompt is that of a row"
            )
        return f"{self.path}: {len(rest)} rows have no image that is scored, such as number {rest[0]}" if rest else ""


def is_numbered(path: Path) -> bool:
    """Return whether a table holds GenEval's facts in rows that name no image."""
    first = next(_rows(path), None)
    return first is not None and named_image(first) is None and bool(geneval_facts(first).get("include"))


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    for _, row in read_rows(path):
        yield row
