"""Read the parquet files of a dataset folder; damage of any kind is one line that says how to mend it.

Pages carry checksums (parquet's own), which are compared when a page is read. Files of earlier versions have none.
"""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from diffalign.data.schema import GROUPS, IMAGES
from diffalign.files import reading

GROUPS_MEND = "make the dataset again with the command that wrote it, or restore the file from a copy"
IMAGES_MEND = "`synth` and `sample` draw it again after it is deleted; convert other datasets again, or restore a copy"
PIECE_MEND = "delete it, and the same command makes it again"
SCORES_MEND = "delete it and score the dataset again"

FILLED = ("group_id", "prompt_id", "prompt", "split", "index")
"""Columns in which every row has a value."""
TYPES = {field.name: field.type for schema in (GROUPS, IMAGES) for field in schema}


def open_parquet(path: Path, mend: str) -> pq.ParquetFile:
    """Return an open file, memory-mapped. Raises DiffalignError where it cannot be read."""
    with reading(path, mend=mend):
        return pq.ParquetFile(path, memory_map=True, page_checksum_verification=True)


def read_columns(path: Path, columns: list[str] | None, mend: str) -> pa.Table:
    """Return columns of a file, all where None, in the types of `data/schema.py`.

    Raises DiffalignError where the file is damaged, lacks a column, or a row has no value that it needs.
    """
    file = open_parquet(path, mend)
    with reading(path, mend=mend):
        return checked(file.read(_present(file, columns)))


def read_batches(path: Path, rows: int, columns: list[str], mend: str) -> Iterator[pa.Table]:
    """Yield columns of a file in tables of `rows` rows; errors as of `read_columns`."""
    file = open_parquet(path, mend)
    with reading(path, mend=mend):
        for batch in file.iter_batches(batch_size=rows, columns=_present(file, columns)):
            yield checked(pa.Table.from_batches([batch]))


def read_row_group(path: Path, file: pq.ParquetFile, number: int, columns: list[str], mend: str) -> pa.Table:
    """Return columns of one row group of an open file; errors as of `read_columns`."""
    with reading(path, mend=mend):
        return checked(file.read_row_group(number, columns=_present(file, columns)))


def checked(table: pa.Table) -> pa.Table:
    """Return a table with its columns in their types. Raises ValueError where a row lacks a value that it needs."""
    for place, name in enumerate(table.column_names):
        column = table[name]
        if name in FILLED and column.null_count:
            row = column.is_null().to_pylist().index(True)
            raise ValueError(f"column {name} is empty in row {row}")
        wanted = TYPES.get(name, column.type)
        if column.type != wanted:
            table = table.set_column(place, name, column.cast(wanted))
    return table


def _present(file: pq.ParquetFile, columns: list[str] | None) -> list[str] | None:
    """Return the columns. Raises ValueError where the file lacks one: pyarrow leaves it out without a word."""
    lacking = next((name for name in columns or () if name not in file.schema_arrow.names), None)
    if lacking is not None:
        raise ValueError(f"no column {lacking}")
    return columns
