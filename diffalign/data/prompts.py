"""Read prompts: one a line (.txt), one JSON object a line (.jsonl, with GenEval's metadata if wanted), or a table."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffalign.data.tables import column_for, json_rows, parquet_rows, read_text, table_kind, table_rows
from diffalign.errors import DiffalignError
from diffalign.files import reading
from diffalign.files.facts import KEYS, geneval_facts
from diffalign.files.paths import inside


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
    if not path.exists():
        raise DiffalignError(f"prompts {path}: no such file; write one prompt a line there, or name another file")
    readers = {".txt": _lines, ".jsonl": _jsonl, ".json": _jsonl, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}
    if table_kind(path) not in readers:
        raise DiffalignError(
            f"prompts {path}: unknown kind of file; use .txt (a prompt a line), .jsonl, .csv or .parquet"
        )
    with reading(path, "prompts "):
        rows = readers[table_kind(path)](path, column)
    if not rows:
        raise DiffalignError(f"prompts {path}: the file holds no prompt")
    return rows


def hub_prompts(name: str, column: str, split: str) -> list[PromptRow]:
    """Return the prompts of a hub dataset (or a local folder that `datasets` opens), with GenEval's facts.

    `column` holds the prompt, as in `read_prompts`; images and other columns are not read.
    """
    import datasets

    try:
        table = datasets.load_dataset(name, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DiffalignError(f"prompts hub:{name}: {str(error).splitlines()[0]}") from error
    found = _prompt_column(column, table.column_names, f"hub:{name}")
    read = table.select_columns([found, *_fact_columns(table.column_names, found)])
    return [
        PromptRow(row[found].strip(), geneval_facts(row))
        for row in read
        if isinstance(row[found], str) and row[found].strip()
    ]


def unique_prompts(rows: list[PromptRow]) -> list[PromptRow]:
    """Return each text once, in the order of first occurrence."""
    first: dict[str, PromptRow] = {}
    for row in rows:
        first.setdefault(row.prompt, row)
    return list(first.values())


def _in_folder(folder: Path, split: str) -> Path:
    for name in (f"{split}_metadata.jsonl", f"{split}.jsonl", f"{split}.txt"):
        if (folder / name).is_file():
            return inside(folder, name)
    raise DiffalignError(f"prompts {folder}: holds neither {split}_metadata.jsonl, {split}.jsonl nor {split}.txt")


def _lines(path: Path, column: str) -> list[PromptRow]:
    # Not splitlines(): it also breaks at U+0085, U+2028 and form feeds, which may stand in a prompt.
    return [PromptRow(line.strip()) for line in read_text(path).split("\n") if line.strip()]


def _jsonl(path: Path, column: str) -> list[PromptRow]:
    rows = []
    for where, row in json_rows(path):
        if isinstance(row, str):
            raise DiffalignError(f'{where}: {row}; every line must be one object with a "prompt"')
        name = column if column in row else column_for("prompt", row)
        text = row.get(name) if name else None
        if not isinstance(text, str) or not text.strip():
            raise DiffalignError(f'{where}: no "prompt"; every line must be one object with a non-empty "prompt"')
        rows.append(PromptRow(text, {k: v for k, v in row.items() if k != name} | geneval_facts(row)))
    return rows


def _csv(path: Path, column: str) -> list[PromptRow]:
    rows = []
    for where, row in table_rows(path):
        if isinstance(row, str):
            raise DiffalignError(f"prompts {where}: {row}")
        name = _prompt_column(column, list(row), f"{path}:1")
        if (row[name] or "").strip():
            rows.append(PromptRow(row[name].strip(), {k: v for k, v in row.items() if k != name} | geneval_facts(row)))
    return rows


def _parquet(path: Path, column: str) -> list[PromptRow]:
    try:
        names = pq.read_schema(path).names
    except pa.ArrowException as error:
        raise DiffalignError(f"prompts {path}: not a complete parquet file ({error})") from error
    name = _prompt_column(column, names, str(path))
    rows = []
    for where, row in parquet_rows(path, [name, *_fact_columns(names, name)]):
        if isinstance(row, str):
            raise DiffalignError(f"prompts {where}: {row}")
        if isinstance(row[name], str) and row[name].strip():
            rows.append(PromptRow(row[name].strip(), geneval_facts(row)))
    return rows


def _fact_columns(names: list[str], prompt: str) -> list[str]:
    return [name for name in (*KEYS, "metadata") if name in names and name != prompt]


def _prompt_column(column: str, names: list[str], where: str) -> str:
    """Return `column`, or if it is the default and not there, the column with a name that is as common."""
    found = column if column in names else column_for("prompt", names) if column == "prompt" else None
    if found is None:
        raise DiffalignError(f"prompts {where}: no column {column!r}; it has {', '.join(names) or 'none'}")
    return found
