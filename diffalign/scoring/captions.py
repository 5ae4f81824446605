"""Find the prompts of images: metadata files, files beside the image, its name, or a table given with `--prompts`."""

import os
import re
from pathlib import Path

from diffalign.data.folder_metadata import TWICE, Caption, caption_of, named_image
from diffalign.data.tables import COLUMNS, column_for, no_column, read_rows
from diffalign.errors import DiffalignError

SOURCES = ("auto", "metadata", "txt", "image", "name", "none")


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
