"""Find the prompts of images: metadata files, files beside the image, its name, or a table given with `--prompts`."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffalign.data.tables import COLUMNS, column_for, no_column, read_rows
from diffalign.errors import DiffalignError
from diffalign.files.paths import inside
from diffalign.rewards.facts import geneval_facts

SOURCES = ("auto", "metadata", "txt", "image", "name", "none")
TWICE = "has another prompt above; name each image once"
METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


@dataclass(frozen=True)
class Caption:
    """A prompt and the metadata (`facts`) that stood beside it."""

    prompt: str | None
    facts: dict[str, Any] = field(default_factory=dict)


def caption_of(row: dict[str, Any], where: str, column: str | None) -> Caption:
    """Return prompt and metadata of a table's row; the prompt is None if its cell is empty."""
    if column is not None and column not in row:
        raise DiffalignError(f"{where}: no column {column!r}; there are {', '.join(map(str, row))}")
    name = column or column_for("prompt", row)
    prompt = row.get(name) if name else None
    return Caption(prompt if isinstance(prompt, str) and prompt.strip() else None, geneval_facts(row))


def folder_metadata(folder: Path, column: str | None) -> tuple[dict[Path, Caption], Caption | None]:
    """Return the captions in a folder's metadata file by image, and GenEval's one caption for the whole folder.

    Images may lie in folders below. Raises DiffalignError for a broken row, and for one that names no image.
    """
    for name in METADATA_FILES:
        path = folder / name
        if path.is_file():
            rows = list(read_rows(inside(folder, name)))
            if len(rows) == 1 and named_image(rows[0][1]) is None and geneval_facts(rows[0][1]).get("include"):
                return {}, caption_of(rows[0][1], rows[0][0], column)
            found: dict[Path, Caption] = {}
            for where, row in rows:
                file = named_image(row)
                if file is None:
                    raise DiffalignError(f"{where}: no file_name; each row of {name} must name its image")
                caption = caption_of(row, where, column)
                if found.setdefault(_below(folder, file, where), caption) != caption:
                    raise DiffalignError(f"{where}: {file!r} {TWICE}")
            return found, None
    return {}, None


def named_image(row: dict[str, Any]) -> str | None:
    """Return the file that a row names, in any of the columns with that meaning."""
    columns = (column_for("image", [n for n in row if isinstance(row[n], str) and row[n]]),)
    return next((row[c] for c in columns if c), None)


def _below(folder: Path, name: str, where: str) -> Path:
    try:
        return inside(folder, name)
    except (DiffalignError, OSError, RuntimeError, ValueError) as error:
        raise DiffalignError(f"{where}: file_name {error}") from error


def plain_path(path: Path) -> str:
    """Return an absolute path without `.` and `..`; links are not followed."""
    return os.path.normpath(path.absolute())


def from_name(path: Path) -> str | None:
    """Return the file's name as a prompt: underscores become spaces, a number at the end (T2I-CompBench's id) is
    removed.
    """
    words = re.sub(r"\s+", " ", re.sub(r"[_-]\d+$", "", path.stem).replace("_", " ")).strip()
    return words or None


class PromptTable:
    """The table of `--prompts FILE`: a prompt for each image, found by path, name or stem.

    Paths are relative to the table or to where the command runs. Raises DiffalignError for a broken row, and for an
    image with two prompts.
    """

    def __init__(self, path: Path, column: str | None) -> None:
        self.path = path
        self.by_name: dict[str, Caption] = {}
        self.by_path: dict[str, str] = {}
        self.used: set[str] = set()
        for where, row in read_rows(path):
            name = named_image(row)
            if name is None:
                raise DiffalignError(f"{where}: no column that names the image; one of {', '.join(COLUMNS['image'])}")
            caption = caption_of(row, where, column)
            same = self.by_path.setdefault(plain_path(path.parent / name), name)
            if self.by_name.setdefault(name, caption) != caption or self.by_name[same] != caption:
                raise DiffalignError(f"{where}: {name!r} {TWICE}")
        if not self.by_name:
            raise DiffalignError(f"{path}: the table is empty")
        first = next(iter(self.by_name.values()))
        if first.prompt is None and not first.facts and column_for("prompt", row) is None:
            raise DiffalignError(f"{path}: {no_column('prompt', row)}")

    def find(self, name: str, key: str, path: Path | None = None) -> Caption | None:
        """Return the caption of an image by its file, its name, its key, or the key's file name or stem.

        None if the table does not name it.
        """
        by_path = self.by_path.get(plain_path(path)) if path is not None else None
        for candidate in (by_path, name, key, os.path.normpath(key), f"./{key}", Path(key).name, Path(key).stem):
            if candidate in self.by_name:
                self.used.add(candidate)
                return self.by_name[candidate]
        return None

    def unused(self) -> str:
        """Return a line about rows whose image was not found, "" if all were. Raises DiffalignError if none was."""
        rest = [name for name in self.by_name if name not in self.used]
        if rest and not self.used:
            raise DiffalignError(
                f"--prompts {self.path}: none of its {len(rest)} rows names an image that is scored, the first is "
                f"{rest[0]!r}; paths are relative to the table"
            )
        return f"{self.path}: {len(rest)} rows name no image that is scored, such as {rest[0]!r}" if rest else ""
