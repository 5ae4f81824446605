"""Ways in which a file is damaged: cut, emptied, overwritten, a bit flipped, a value or a column changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import load_file, save_file

Damage = Callable[[Path], None]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def junk(path: Path) -> None:
    path.write_bytes(b"\x93\xff\x00junk" * 9)


def nested(path: Path) -> None:
    path.write_text("[" * 5000)


def page(path: Path) -> None:
    """Flip a bit of the first page."""
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)


def last(path: Path) -> None:
    """Flip the lowest bit of the last number."""
    data = bytearray(path.read_bytes())
    data[-4] ^= 1
    path.write_bytes(data)


def text(content: str) -> Damage:
    return lambda path: path.write_text(content) and None  # type: ignore[func-returns-value]


def replaced(old: str, new: str) -> Damage:
    def change(path: Path) -> None:
        content = path.read_text()
        assert old in content
        path.write_text(content.replace(old, new, 1))

    return change


def table(change: Callable[[list[dict[str, Any]]], Any]) -> Damage:
    """Write a parquet file again with changed rows, types inferred."""

    def write(path: Path) -> None:
        rows = pq.read_table(path).to_pylist()
        change(rows)
        pq.write_table(pa.Table.from_pylist(rows), path)

    return write


def without(column: str) -> Damage:
    return table(lambda rows: [row.pop(column) for row in rows])


def cell(column: str, value: Any, all_rows: bool = False) -> Damage:
    return table(lambda rows: [row.update({column: value}) for row in (rows if all_rows else rows[1:2])])


def json_value(*place: Any, value: Any) -> Damage:
    """Set a value inside a JSON file, or delete it where `value` is `...`."""

    def change(path: Path) -> None:
        content = at = json.loads(path.read_text())
        for key in place[:-1]:
            at = at[key]
        if value is ...:
            del at[place[-1]]
        else:
            at[place[-1]] = value
        path.write_text(json.dumps(content))

    return change


def tensors(change: Callable[[dict[str, Any]], Any]) -> Damage:
    def write(path: Path) -> None:
        found = load_file(path)
        change(found)
        save_file(found, path)

    return write
