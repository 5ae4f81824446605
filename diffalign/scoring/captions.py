"""Find the prompts of images: metadata files, a .txt beside the image, its name, or a table given with `--prompts`."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffalign.data.schema import inside
from diffalign.data.tables import read_rows
from diffalign.errors import DiffalignError

PROMPT_COLUMNS = ("prompt", "text", "caption")
FILE_COLUMNS = ("file_name", "image", "file", "path", "name")
SOURCES = ("auto", "metadata", "txt", "name", "none")
METADATA_FILES = ("metadata.jsonl", "metadata.csv")


@dataclass(frozen=True)
class Caption:
    """A prompt and the metadata (`facts`) that stood beside it."""

    prompt: str | None
    facts: dict[str, Any] = field(default_factory=dict)


def caption_of(row: dict[str, Any], where: str, column: str | None) -> Caption:
    """Return prompt and metadata of a table's row; the prompt is None if its cell is empty."""
    if column is not None and column not in row:
        raise DiffalignError(f"{where}: no column {column!r}; there are {', '.join(map(str, row))}")
    name = column or next((c for c in PROMPT_COLUMNS if c in row), None)
    prompt = row.get(name) if name else None
    return Caption(prompt if isinstance(prompt, str) and prompt.strip() else None, facts_of(row))


def facts_of(row: dict[str, Any]) -> dict[str, Any]:
    """Return GenEval's metadata if the row has it, also from JSON text in a column `metadata`."""
    packed = row.get("metadata")
    if isinstance(packed, str) and packed.startswith("{"):
        try:
            packed = json.loads(packed)
        except ValueError:
            packed = None
    facts = dict(packed) if isinstance(packed, dict) else {}
    return facts | {key: row[key] for key in ("tag", "include", "exclude") if row.get(key) is not None}


def folder_metadata(folder: Path, column: str | None) -> tuple[dict[Path, Caption], Caption | None]:
    """Return the captions in a folder's metadata file by image, and GenEval's one caption for the whole folder."""
    for name in METADATA_FILES:
        path = folder / name
        if path.is_file():
            rows = list(read_rows(path))
            if len(rows) == 1 and not any(c in rows[0][1] for c in FILE_COLUMNS[:1]):
                return {}, caption_of(rows[0][1], rows[0][0], column)
            found = {}
            for where, row in rows:
                if not isinstance(row.get("file_name"), str):
                    raise DiffalignError(f"{where}: no file_name; each row of {name} must name its image")
                found[_below(folder, row["file_name"], where)] = caption_of(row, where, column)
            return found, None
    return {}, None


def _below(folder: Path, name: str, where: str) -> Path:
    try:
        inside(folder, name)
    except (DiffalignError, OSError, RuntimeError, ValueError) as error:
        raise DiffalignError(f"{where}: file_name {name!r} leaves its folder {folder}") from error
    return folder / name


def sidecar(path: Path) -> str | None:
    """Return the text of `a.txt` beside `a.png`; None if there is none."""
    text = path.with_suffix(".txt")
    try:
        return text.read_text(encoding="utf-8").strip() or None if text.is_file() else None
    except (OSError, UnicodeDecodeError):
        return None


def from_name(path: Path) -> str | None:
    """Return the file's name as a prompt: underscores become spaces, a number at the end (T2I-CompBench's id) is
    removed.
    """
    words = re.sub(r"\s+", " ", re.sub(r"[_-]\d+$", "", path.stem).replace("_", " ")).strip()
    return words or None


class PromptTable:
    """The table of `--prompts FILE`: a prompt for each image, found by path, name or stem."""

    def __init__(self, path: Path, column: str | None) -> None:
        self.path = path
        self.by_name: dict[str, Caption] = {}
        for where, row in read_rows(path):
            name = next((row[c] for c in FILE_COLUMNS if isinstance(row.get(c), str)), None)
            if name is None:
                raise DiffalignError(f"{where}: no column that names the image; one of {', '.join(FILE_COLUMNS)}")
            self.by_name[name] = caption_of(row, where, column)
        if not self.by_name:
            raise DiffalignError(f"{path}: the table is empty")

    def find(self, name: str, key: str) -> Caption | None:
        """Return the caption of an image by its name, its key, or the key's file name or stem; None if it has none."""
        for candidate in (name, key, Path(key).name, Path(key).stem):
            if candidate in self.by_name:
                return self.by_name[candidate]
        return None
