"""Read the captions that a folder's metadata file gives to its images: the layout of `datasets`' imagefolder."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffalign.data.tables import column_for, read_rows
from diffalign.errors import DiffalignError
from diffalign.files.facts import geneval_facts
from diffalign.files.paths import inside

METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
TWICE = "has another prompt above; name each image once"


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
