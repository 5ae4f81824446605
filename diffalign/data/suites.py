"""Read the field's prompt suites by name from where the user keeps them: `suite:NAME:PATH`. None is shipped.

`diffalign.data.suites_hub` reads those that the hub has. Each reader keeps the suite's own categories as
`metadata["tag"]`, by which evaluation breaks scores down.

    geneval       evaluation_metadata.jsonl (Ghosh et al. 2023)
    hpsv2         folder with anime.json, concept-art.json, paintings.json, photo.json (Wu et al. 2023)
    partiprompts  PartiPrompts.tsv: Prompt, Category, Challenge (Yu et al. 2022)
    drawbench     csv: Prompts, Category (Saharia et al. 2022)
    t2i-compbench folder of <kind>_val.txt files, a prompt a line (Huang et al. 2023)
    pickapic      test split of Pick-a-Pic as parquet, csv or jsonl: caption (Kirstain et al. 2023)

Suites with questions for a judge are read in `diffalign.data.suites_questions`.
"""

import csv
import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffalign.data.prompts import PromptRow, read_prompts, unique_prompts
from diffalign.data.suites_questions import read_dpgbench, read_geneval2, read_unigenbench, read_wise
from diffalign.data.tables import parquet_rows, read_rows, table_schema
from diffalign.errors import DiffalignError
from diffalign.files import reading
from diffalign.files.parse import parse_json
from diffalign.files.paths import own_files

csv.field_size_limit(1 << 20)
STYLES = ("anime", "concept-art", "paintings", "photo")


def _text(path: Path) -> str:
    with reading(path, "suite file "):
        return path.read_text(encoding="utf-8-sig")


def _column(rows: list[dict[str, Any]], name: str, path: Path) -> None:
    if not rows or name not in rows[0]:
        have = ", ".join(map(str, rows[0])) if rows else "no rows"
        raise DiffalignError(f"suite file {path}: no column {name!r}; it has {have}")


def _table(path: Path, delimiter: str, prompt: str, tag: str | None) -> list[PromptRow]:
    try:
        rows: list[dict[str, Any]] = [
            dict(row) for row in csv.DictReader(_text(path).splitlines(), delimiter=delimiter)
        ]
    except csv.Error as error:
        raise DiffalignError(f"suite file {path}: cannot be read as a table: {error}") from error
    for name in (prompt, tag) if tag else (prompt,):
        _column(rows, name, path)
    return [PromptRow((row[prompt] or "").strip(), {"tag": row[tag]} if tag else {}) for row in rows]


def _folder(path: Path, pattern: str) -> list[Path]:
    files = own_files(path, pattern) if path.is_dir() else []
    if not files:
        raise DiffalignError(f"suite folder {path}: it holds no {pattern}")
    return files


def _hpsv2(path: Path) -> list[PromptRow]:
    """Read the benchmark's four styles; the folder in which they are published also holds DrawBench's prompts."""
    rows = []
    for style in STYLES:
        file = path / f"{style}.json"
        try:
            prompts = parse_json(_text(file))
        except ValueError as error:
            raise DiffalignError(f"suite file {file}: not JSON ({error})") from error
        if not isinstance(prompts, list) or not all(isinstance(p, str) for p in prompts):
            raise DiffalignError(f"suite file {file}: a list of prompts is expected")
        rows += [PromptRow(p.strip(), {"tag": file.stem}) for p in prompts]
    return rows


def _compbench(path: Path) -> list[PromptRow]:
    return [
        PromptRow(line.strip(), {"tag": file.stem.removesuffix("_val")})
        for file in _folder(path, "*_val.txt")
        for line in _text(file).splitlines()
    ]


def _pickapic(path: Path) -> list[PromptRow]:
    if path.suffix == ".parquet":
        if not path.is_file():
            raise DiffalignError(f"suite file {path}: does not exist")
        if "caption" not in table_schema(path).names:
            raise DiffalignError(f"suite file {path}: no column 'caption'")
        captions = []
        for where, row in parquet_rows(path, ["caption"]):  # the images beside it are not read
            if isinstance(row, str):
                raise DiffalignError(f"{where}: {row}")
            captions.append(PromptRow(str(row["caption"]).strip()))
        return captions
    if path.suffix == ".jsonl":
        rows = [row for _, row in read_rows(path)]
        _column(rows, "caption", path)
        return [PromptRow(str(row["caption"]).strip()) for row in rows]
    return _table(path, ",", "caption", None)


SUITES: dict[str, Callable[[Path], list[PromptRow]]] = {
    "geneval": read_prompts,
    "hpsv2": _hpsv2,
    "partiprompts": lambda path: _table(path, "\t", "Prompt", "Category"),
    "drawbench": lambda path: _table(path, ",", "Prompts", "Category"),
    "dpgbench": read_dpgbench,
    "t2i-compbench": _compbench,
    "pickapic": _pickapic,
    "geneval2": read_geneval2,
    "unigenbench": read_unigenbench,
    "wise": read_wise,
}


def read_suite(name: str, path: Path, unique: bool = True) -> list[PromptRow]:
    """Return the suite's prompts in its own order. Raises DiffalignError with the file.

    unique: whether a prompt that is there twice is returned once. Published protocols count it twice.
    """
    if name not in SUITES:
        near = difflib.get_close_matches(name, SUITES, n=1)
        raise DiffalignError(
            f"prompts=suite:{name}: unknown suite; {f'did you mean {near[0]}?' if near else 'one of ' + ', '.join(SUITES)}"
        )
    if not str(path) or not path.exists():
        raise DiffalignError(f"prompts=suite:{name}:PATH: {path} does not exist; give where the suite's prompts lie")
    rows = [row for row in SUITES[name](path) if row.prompt]
    if not rows:
        raise DiffalignError(f"suite {name} at {path}: it holds no prompt")
    return unique_prompts(rows) if unique else rows
