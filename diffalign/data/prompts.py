"""Read prompts: one a line (.txt), one JSON object a line (.jsonl, with GenEval's metadata if wanted), or a table."""

import csv
import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffalign.data.tables import json_rows
from diffalign.errors import DiffalignError
from diffalign.files import reading


@dataclass(frozen=True)
class PromptRow:
    """A prompt and the metadata that a reward may need."""

    prompt: str
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def prompt_id(self) -> str:
        """Short hash of the prompt's text."""
        return hashlib.blake2b(self.prompt.encode(), digest_size=8).hexdigest()


def read_prompts(path: Path | str, column: str = "prompt", split: str = "train") -> list[PromptRow]:
    """Return the prompts of a .txt, .jsonl, .csv or .parquet file, or of a folder as flow_grpo keeps its prompts.

    Such a folder holds <split>.txt or <split>_metadata.jsonl. Blank lines are skipped. In a csv or parquet file,
    `column` holds the prompt; the other columns of a csv become its metadata. Raises DiffalignError with file and line.
    """
    path = Path(path)
    if path.is_dir():
        path = _in_folder(path, split)
    readers = {".txt": _lines, ".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
    if path.suffix not in readers:
        raise DiffalignError(
            f"prompts {path}: unknown kind of file; use .txt (a prompt a line), .jsonl, .csv or .parquet"
        )
    with reading(path, "prompts "):
        rows = readers[path.suffix](path, column)
    if not rows:
        raise DiffalignError(f"prompts {path}: the file holds no prompt")
    return rows


def hub_prompts(name: str, column: str, split: str) -> list[PromptRow]:
    """Return the prompts of a hub dataset (or a local folder that `datasets` opens); only `column` is read."""
    import datasets

    try:
        table = datasets.load_dataset(name, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DiffalignError(f"prompts hub:{name}: {str(error).splitlines()[0]}") from error
    if column not in table.column_names:
        raise DiffalignError(f"prompts hub:{name}: no column {column!r}; it has {', '.join(table.column_names)}")
    texts = table.select_columns([column])[column]
    return [PromptRow(text.strip()) for text in texts if isinstance(text, str) and text.strip()]


def unique_prompts(rows: list[PromptRow]) -> list[PromptRow]:
    """Return each text once, in the order of first occurrence."""
    first: dict[str, PromptRow] = {}
    for row in rows:
        first.setdefault(row.prompt, row)
    return list(first.values())


def _in_folder(folder: Path, split: str) -> Path:
    for name in (f"{split}_metadata.jsonl", f"{split}.jsonl", f"{split}.txt"):
        if (folder / name).is_file():
            return folder / name
    raise DiffalignError(f"prompts {folder}: holds neither {split}_metadata.jsonl, {split}.jsonl nor {split}.txt")


def _lines(path: Path, column: str) -> list[PromptRow]:
    return [PromptRow(line.strip()) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _jsonl(path: Path, column: str) -> list[PromptRow]:
    rows = []
    for where, row in json_rows(path):
        if isinstance(row, str):
            raise DiffalignError(f'{where}: {row}; every line must be one object with a "prompt"')
        if not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
            raise DiffalignError(f'{where}: no "prompt"; every line must be one object with a non-empty "prompt"')
        rows.append(PromptRow(row["prompt"], {k: v for k, v in row.items() if k != "prompt"}))
    return rows


def _csv(path: Path, column: str) -> list[PromptRow]:
    with path.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream)
        if column not in (reader.fieldnames or []):
            raise DiffalignError(
                f"prompts {path}:1: no column {column!r}; it has {', '.join(reader.fieldnames or []) or 'none'}"
            )
        return [
            PromptRow(row[column].strip(), {k: v for k, v in row.items() if k != column and isinstance(k, str)})
            for row in reader
            if (row[column] or "").strip()
        ]


def _parquet(path: Path, column: str) -> list[PromptRow]:
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise DiffalignError(f"prompts {path}: not a complete parquet file ({error})") from error
    if column not in file.schema_arrow.names:
        raise DiffalignError(f"prompts {path}: no column {column!r}; it has {', '.join(file.schema_arrow.names)}")
    texts = file.read(columns=[column])[column].to_pylist()
    return [PromptRow(text.strip()) for text in texts if isinstance(text, str) and text.strip()]
