"""Read data with groups of images: HPDv2, and imagefolder with metadata.jsonl."""

from collections.abc import Iterator
from math import isfinite
from pathlib import Path, PurePath
from typing import Any

import pyarrow as pa

from diffalign.data.containers import TABLES, RowOrigin, image_rows, kind_of, tables_below
from diffalign.data.folder_metadata import METADATA_FILES
from diffalign.data.imported import (
    ImportedGroup,
    ImportedImage,
    LabelKind,
    SkippedRow,
    finite_number,
    preference_of,
)
from diffalign.data.read_pairs import split_of
from diffalign.data.tables import column_for, json_files, json_rows, table_rows, table_schema
from diffalign.errors import DiffalignError
from diffalign.files.paths import inside, own_file

Rows = Iterator[ImportedGroup | SkippedRow]
# Columns of metadata.jsonl that mean something here; the others are a group's facts.
OWN = {"file_name", "prompt", "text", "group_id", "preference", "rank", "score", "split", "model"}
OWN |= {"chosen_file_name", "rejected_file_name", "folder", "default_split"}
LABELS: tuple[LabelKind, ...] = ("preference", "rank", "score")
USUAL = {"prompt": "prompt", "image": "file_name", "winner": "chosen_file_name", "loser": "rejected_file_name"}


def read_hpdv2(path: Path) -> Rows:
    """Read HPDv2: train.json (file_path, human_preference: 1 for the preferred) and test.json (image_path, rank).

    Rank 1 is the best. Images lie in train/ and test/ beside the JSON, or directly beside it. A tied pair (no image, or
    both, preferred) is counted and not kept.
    """
    files = [path / f"{s}.json" for s in ("train", "test")] if path.is_dir() else [path]
    files = [own_file(file.parent, file) if path.is_dir() else file for file in files if file.is_file()]
    if not files:
        raise DiffalignError(f"{path}: holds neither train.json nor test.json")
    for file in files:
        for where, row in json_rows(file):
            yield SkippedRow(where, row) if isinstance(row, str) else _hpdv2_row(row, where, file)


def _hpdv2_row(row: dict[str, Any], where: str, file: Path) -> ImportedGroup | SkippedRow:
    names = row.get("file_path") or row.get("image_path")
    ranked = row.get("rank") is not None
    labels = row.get("rank") if ranked else row.get("human_preference")
    if not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        return SkippedRow(where, "no prompt")
    if not isinstance(names, list) or len(names) < 2 or not all(isinstance(n, str) for n in names):
        return SkippedRow(where, "file_path or image_path must list at least two images")
    if not isinstance(labels, list) or len(labels) != len(names):
        return SkippedRow(
            where, f"{'rank' if ranked else 'human_preference'} must have {len(names)} values, one an image"
        )
    if not ranked and not all(x in (0, 1) for x in labels if finite_number(x) is not None):
        return SkippedRow(where, f"label out of range: {labels}")
    preference = preference_of(labels, "rank" if ranked else "preference")
    if len({x for x in preference if isfinite(x)}) == 1:
        return SkippedRow(where, "ties", fault=False)
    images = []
    for name in names:
        try:
            tried = [inside(file.parent, str(Path(folder) / name)) for folder in (file.stem, ".")]
        except DiffalignError as error:
            return SkippedRow(where, str(error))
        images.append(next((p for p in tried if p.is_file()), tried[0]))
    return ImportedGroup(row["prompt"].strip(), tuple(images), preference, where, split=file.stem)


def read_imagefolder(path: Path) -> Rows:
    """Read a folder of images with metadata.jsonl (or .csv): file_name and text or prompt, one row an image.

    Or JSON, parquet or arrow files with such rows; the images may be in the tables, as in ImageRewardDB. Rows with one
    group_id, prompt_id or else prompt are a group. `preference` in [0, 1], `rank` (1 is the best) or `score` (higher is
    better) orders them; a group with none of these is kept without a preference. Or one row a pair: chosen_file_name and
    rejected_file_name.
    """
    files = [path]
    if path.is_dir():
        files = [inside(path, name) for name in METADATA_FILES if (path / name).is_file()][:1]
        files = files or json_files(path) or tables_below(path)
    if not files:
        raise DiffalignError(f"{path}: holds neither metadata.jsonl nor metadata.csv")
    groups: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for where, row in (found for file in files for found in _table(file)):
        if isinstance(row, str):
            yield SkippedRow(where, row)
            continue
        prompt = row.get("prompt")
        if not isinstance(prompt, str) or not prompt.strip():
            yield SkippedRow(where, "no prompt or text")
        elif row.get("chosen_file_name") and row.get("rejected_file_name"):
            yield _pair(prompt.strip(), where, row)
        elif not isinstance(row.get("file_name"), str | RowOrigin):
            yield SkippedRow(where, "no file_name")
        else:
            row["prompt"] = prompt.strip()
            groups.setdefault(str(row.get("group_id") or row.get("prompt_id") or row["prompt"]), []).append(
                (where, row)
            )
    for rows in groups.values():
        if len({row["prompt"] for _, row in rows}) > 1:
            yield SkippedRow(rows[0][0], "the rows of this group_id have different prompts")
        else:
            yield _folder_group(rows[0][1]["prompt"], rows, rows[0][1])


def _pair(prompt: str, where: str, row: dict[str, Any]) -> ImportedGroup | SkippedRow:
    sides = [row[f"{side}_file_name"] for side in ("chosen", "rejected")]
    pair = [{"file_name": name, "folder": row["folder"], "rank": n} for n, name in enumerate(sides, start=1)]
    return _folder_group(prompt, [(where, one) for one in pair], row)


def _folder_group(
    prompt: str, rows: list[tuple[str, dict[str, Any]]], facts: dict[str, Any]
) -> ImportedGroup | SkippedRow:
    images: list[ImportedImage] = []
    where = rows[0][0]
    preference: tuple[float, ...] = ()
    try:
        for _, row in rows:
            named = row["file_name"]
            if not isinstance(named, str | RowOrigin):
                return SkippedRow(where, f"{named!r} is no file name")
            images.append(_located(row["folder"], named) if isinstance(named, str) else named)
        name = next((n for n in LABELS if any(finite_number(row.get(n)) is not None for _, row in rows)), None)
        name = name or next((n for n in LABELS if any(row.get(n) is not None for _, row in rows)), None)
        if name is not None:
            preference = preference_of([row.get(name) for _, row in rows], name)
    except DiffalignError as error:
        return SkippedRow(where, str(error))
    metadata = {k: v for k, v in facts.items() if k not in OWN}
    models = tuple(str(row.get("model") or "imported") for _, row in rows)
    split = str(facts.get("split") or facts["default_split"])
    return ImportedGroup(prompt, tuple(images), preference, where, models, split, metadata)


def _located(folder: Path, name: str) -> Path:
    """Return a named file: below the folder, or beside the table, where ImageRewardDB's zip files have what their rows name
    from the root of the data set.
    """
    file, beside = inside(folder, name), folder / PurePath(name).name
    return beside if beside.is_file() and not file.exists() else file


def _table(path: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Yield the rows of a metadata file: its image, prompt and pair under their usual names, empty cells left out.

    `folder` and `default_split` are added: where its names begin, and the split that the file's name gives.
    """
    own = {"folder": path.parent, "default_split": split_of(path)}
    for where, row in _rows(path):
        if isinstance(row, str):
            yield where, row
            continue
        names = {column_for(meaning, row): name for meaning, name in USUAL.items()}
        cells = {names.get(k, k): v.strip() if isinstance(v, str) else v for k, v in row.items() if v not in ("", None)}
        yield where, cells | own


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    schema = table_schema(path) if kind_of(path) in TABLES else pa.schema([])
    column = column_for("image", schema.names)
    kind = schema.field(column).type if column is not None else None
    if column is None or not (pa.types.is_struct(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        yield from table_rows(path)  # the images are files
        return
    for where, row, origin in image_rows(path, column):
        yield where, row if isinstance(row, str) else {**row, column: origin}
