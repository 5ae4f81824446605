"""Read tables that others wrote (csv, tsv, JSON, JSON lines, parquet), each row with its place in the file.

Text is UTF-8 with or without a byte order mark, or UTF-16 with one. Any table may be compressed as NAME.gz.
"""

import csv
import gzip
import io
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffalign.errors import DiffalignError
from diffalign.files import reading
from diffalign.files.parse import TooDeep, json_entries, parse_json
from diffalign.files.paths import own_files

Row = dict[str, Any]
Rows = Iterator[tuple[str, Row | str]]
"""(place, row) of each row; for a row that cannot be read, what is wrong instead of the row."""

ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
DELIMITERS = ",;\t|"
UNREADABLE_CELLS = (pa.ArrowException, OSError, ValueError, ArithmeticError)
"""What pyarrow raises on damaged pages, and on values that Python does not have, such as the year 60,000."""
BATCH = 64  # rows of a parquet file in memory
OF_DATASETS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
COLUMNS = {
    "prompt": ("prompt", "text", "caption"),
    "image": ("file_name", "filename", "image_path", "image", "file", "path", "name", "id"),
    "winner": ("winner", "chosen", "preferred", "chosen_file_name", "image_w", "win", "img_better"),
    "loser": ("loser", "rejected", "rejected_file_name", "image_l", "lose", "img_worse"),
    "a": ("image_a", "image_0", "image1", "left_image", "a"),
    "b": ("image_b", "image_1", "image2", "right_image", "b"),
    "choice": ("choice", "label", "preference", "vote_type"),
    "rating": ("rating", "score", "stars"),
    "group": ("group", "group_id", "prompt_id"),
    "condition": ("condition", "condition_image", "source_image", "input_image", "edited_from"),
}
"""What columns mean -> the names they have in people's tables, the first one that is there wins."""


def column_for(meaning: str, names: Iterable[str]) -> str | None:
    """Return the column with this meaning (a key of `COLUMNS`); capitals and blanks around a name do not matter."""
    by_plain = {name.strip().lower(): name for name in reversed([n for n in names if isinstance(n, str)])}
    return next((by_plain[name] for name in COLUMNS[meaning] if name in by_plain), None)


def no_column(meaning: str, names: Iterable[str]) -> str:
    """Return what to tell the user if there is no column with this meaning: the names that are known and those found."""
    found = ", ".join(n for n in names if isinstance(n, str)) or "none"
    return f"column {meaning} is missing (known as {', '.join(COLUMNS[meaning])}); there are {found}"


def read_text(path: Path) -> str:
    """Return a text file's content. A byte order mark names the encoding and is removed; without one it is UTF-8.

    Raises DiffalignError for a file that cannot be read or has another encoding.
    """
    with reading(path):
        return decoded_text(_bytes(path))


def decoded_text(data: bytes) -> str:
    """Return text by its byte order mark, UTF-8 without one. Raises UnicodeDecodeError."""
    utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    return data.decode("utf-16" if utf16 else "utf-8-sig")


def json_files(folder: Path) -> list[Path]:
    """Return a folder's .json and .jsonl files, without those in which the `datasets` library keeps no rows."""
    return [path for path in own_files(folder, "*.json", "*.jsonl") if path.name not in OF_DATASETS]


def table_kind(path: Path) -> str:
    """Return the suffix that says what a table is, without `.gz`."""
    return Path(path.stem).suffix.lower() if path.suffix == ".gz" else path.suffix.lower()


def table_rows(path: Path, columns: list[str] | None = None) -> Rows:
    """Yield the rows of a table, with cells unchanged. A broken row costs only itself.

    columns: those to read of a parquet or arrow file. Raises DiffalignError for a file that cannot be read as a whole.
    """
    kind = table_kind(path)
    if kind == ".parquet":
        yield from parquet_rows(path, columns)
    elif kind == ".arrow":
        yield from _arrow_rows(path, columns)
    elif kind in (".csv", ".tsv"):
        yield from _csv(path)
    elif kind in (".jsonl", ".json"):
        yield from json_rows(path)
    else:
        raise DiffalignError(f"{path}: unknown kind of table; use {', '.join(ENDINGS)}")


def read_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield (place, row) of a table, with cells unchanged.

    Raises DiffalignError with file and line for the first row that cannot be read.
    """
    for where, row in table_rows(path):
        if isinstance(row, str):
            raise DiffalignError(f"{where}: {row}")
        yield where, row


def json_rows(path: Path) -> Rows:
    """Yield the rows of a JSON list or JSON lines.

    Raises DiffalignError for a file that cannot be read or is not JSON as a whole.
    """
    text = read_text(path)
    try:
        rows = None if table_kind(path) == ".jsonl" else parse_json(text)
    except TooDeep as error:
        if text.lstrip()[:1] != "[":
            raise DiffalignError(f"{path}: not JSON ({error})") from error
        for number, entry in enumerate(json_entries(text)):
            yield f"{path}[{number}]", json_object(entry)
        return
    except ValueError as error:
        if text.lstrip()[:1] != "{":
            raise DiffalignError(f"{path}: not JSON ({error})") from error
        rows = None  # JSON lines under another name
    if rows is None:
        # Not splitlines(): it also breaks at U+2028, which JSON allows inside a string.
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield f"{path}:{number}", json_object(line)
        return
    if isinstance(rows, dict):
        rows = [rows]
    if not isinstance(rows, list):
        raise DiffalignError(f"{path}: a list of rows is expected, not a {type(rows).__name__}")
    for number, row in enumerate(rows):
        yield f"{path}[{number}]", _object(row)


def parquet_rows(path: Path, columns: list[str] | None = None) -> Rows:
    """Yield the rows of a parquet file, `BATCH` at a time. A damaged row group costs only itself."""
    try:
        with reading(path):
            file = pq.ParquetFile(path, page_checksum_verification=True)
    except pa.ArrowException as error:
        raise DiffalignError(f"{path}: cannot be read as a table: {error}") from error
    number = 0
    for group in range(file.num_row_groups):
        first = number
        try:
            for batch in file.iter_batches(BATCH, row_groups=[group], columns=columns):
                for row in batch.to_pylist():
                    yield f"{path} row {number}", row
                    number += 1
        except UNREADABLE_CELLS as error:
            yield f"{path} row {number}", f"rows from here cannot be read ({' '.join(str(error).split())})"
        number = first + file.metadata.row_group(group).num_rows


def table_schema(path: Path) -> pa.Schema:
    """Return the columns of a parquet or arrow file; none for an arrow file without rows.

    Raises DiffalignError for a file that is not complete.
    """
    if path.suffix.lower() == ".arrow":
        batches = arrow_batches(path)
        return batches[0].schema if batches else pa.schema([])
    try:
        with reading(path):
            return pq.read_schema(path)
    except pa.ArrowException as error:
        raise DiffalignError(f"{path}: not a complete parquet file ({str(error).splitlines()[0]})") from error


def arrow_batches(path: Path) -> list[pa.RecordBatch]:
    """Return the batches of an arrow file as `datasets` saves them, memory-mapped.

    Raises DiffalignError for a file that is not complete.
    """
    try:
        return list(_batches(pa.memory_map(str(path))))
    except (pa.ArrowException, OSError) as error:
        raise DiffalignError(f"{path}: not a complete arrow file ({str(error).splitlines()[0]})") from error


def _batches(source: pa.NativeFile) -> Iterator[pa.RecordBatch]:
    try:
        yield from pa.ipc.open_stream(source)
    except pa.ArrowInvalid:
        source.seek(0)
        file = pa.ipc.open_file(source)
        yield from (file.get_batch(i) for i in range(file.num_record_batches))


def _arrow_rows(path: Path, columns: list[str] | None) -> Rows:
    number = 0
    for whole in arrow_batches(path):
        batch = whole.select(columns) if columns else whole
        for start in range(0, batch.num_rows, BATCH):
            some = batch.slice(start, BATCH)
            try:
                yield from ((f"{path} row {number + n}", row) for n, row in enumerate(some.to_pylist()))
            except UNREADABLE_CELLS as error:
                yield f"{path} row {number}", f"rows from here cannot be read ({' '.join(str(error).split())})"
            number += some.num_rows


def _bytes(path: Path) -> bytes:
    if path.suffix != ".gz":
        return path.read_bytes()
    try:
        with gzip.open(path) as stream:
            return stream.read()
    except (EOFError, zlib.error) as error:
        raise OSError(f"not a complete gzip file ({error})") from error


def _csv(path: Path) -> Rows:
    text = read_text(path)
    head = text.lstrip().split("\n", 1)[0]
    delimiter = "\t" if table_kind(path) == ".tsv" else max(DELIMITERS, key=head.count)
    csv.field_size_limit(2**31 - 1)  # the limit of 131,072 is not for prompts and JSON in a cell
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=f"{delimiter} " in head
    )
    names: list[str] | None = None
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield f"{path}:{reader.line_num}", f"cannot be read as a table: {error}"
            continue
        where = f"{path}:{reader.line_num}"
        if names is None:
            names = [name.strip() for name in cells]
        elif len(cells) > len(names):
            yield where, f"{len(cells)} cells for {len(names)} columns; write text that holds {delimiter!r} in quotes"
        elif cells:
            yield where, dict(zip(names, [*cells, *[None] * (len(names) - len(cells))], strict=True))


def json_object(line: str) -> Row | str:
    """Return the object that a line of JSON holds, or what is wrong with it."""
    try:
        return _object(parse_json(line))
    except ValueError as error:
        return f"not JSON ({error})"


def _object(value: object) -> Row | str:
    return value if isinstance(value, dict) else f"an object is expected, not {type(value).__name__}"
