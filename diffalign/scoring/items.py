"""Describe one image to score: where its bytes are, and what is known of its prompt."""

import hashlib
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from diffalign.errors import DiffalignError
from diffalign.files.images import Unreadable, read_file
from diffalign.files.paths import inside


class Origin(Protocol):
    """Something that holds an image's encoded bytes."""

    def read(self) -> bytes:
        """Return the bytes. Raises Unreadable."""
        ...


@dataclass(frozen=True)
class FileOrigin:
    """An image in a file."""

    path: Path

    def read(self) -> bytes:
        return read_file(self.path)


@dataclass(frozen=True)
class RefusedOrigin:
    """An image that is not read, and why."""

    reason: str

    def read(self) -> bytes:
        raise Unreadable(self.reason)


class ParquetImages:
    """The image column of a parquet file, read a row group at a time; threads share what is in memory."""

    KEEP = 3  # row groups: those of the current window of images, and the one before them

    def __init__(self, path: Path, column: str) -> None:
        self.path, self.column = path, column
        self._file = pq.ParquetFile(path, memory_map=True)
        self._kept: OrderedDict[int, list[Any]] = OrderedDict()
        self._lock = threading.Lock()

    def row_counts(self) -> list[int]:
        """Return the number of rows of each row group."""
        return [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]

    def read(self, row_group: int, row: int) -> bytes:
        """Return an image's encoded bytes. Raises Unreadable if the row holds none."""
        with self._lock:
            if row_group not in self._kept:
                try:
                    table = self._file.read_row_group(row_group, columns=[self.column])
                    self._kept[row_group] = table[self.column].to_pylist()
                except (pa.ArrowException, OSError) as error:
                    raise Unreadable(f"damaged parquet file: {str(error).splitlines()[0]}") from error
                while len(self._kept) > self.KEEP:
                    self._kept.popitem(last=False)
            value = self._kept[row_group][row]
        return image_bytes(value, self.path.parent)


def image_bytes(value: Any, folder: Path) -> bytes:
    """Return the encoded bytes in a table's cell: bytes, a struct with bytes, or the path of a file below `folder`.

    Raises Unreadable if the cell holds none.
    """
    data = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(data, bytes):
        return data
    path = value.get("path") if isinstance(value, dict) else None
    # The path was written by somebody else, so only files beside the table are opened.
    try:
        file = inside(folder, path) if isinstance(path, str) else None
    except DiffalignError:
        file = None
    if file is None:
        raise Unreadable("the row holds no image bytes")
    return read_file(file)


@dataclass(frozen=True)
class RowOrigin:
    """An image in a row of a parquet file."""

    images: ParquetImages
    row_group: int
    row: int

    def read(self) -> bytes:
        return self.images.read(self.row_group, self.row)


@dataclass(frozen=True)
class Item:
    """An image to score.

    name: unique among the items, as the user would write it. key: the name below its source, for pairing two folders.
    group: (group id, index) if it comes from a dataset folder. fault: why a file that should hold the prompt is unreadable.
    """

    name: str
    key: str
    origin: Origin
    prompt: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    group: tuple[str, int] | None = None
    fault: str = ""

    @property
    def path(self) -> Path | None:
        """The image's file; None if it lies in a container."""
        return self.origin.path if isinstance(self.origin, FileOrigin) else None


def digest(data: bytes) -> str:
    """Return SHA-256 in hex, as `sha256sum` prints it."""
    return hashlib.sha256(data).hexdigest()
