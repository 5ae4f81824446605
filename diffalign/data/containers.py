"""Images in parquet and arrow files, and in tar and zip files: read one at a time, by any number of threads.

`diffalign score` and the readers of other people's data share these.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import shutil
import tarfile
import tempfile
import threading
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path, PurePosixPath
from typing import IO, Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from diffalign.data.tables import UNREADABLE_CELLS, Row, arrow_batches
from diffalign.errors import DiffalignError
from diffalign.files import free_bytes
from diffalign.files.images import Unreadable, read_file
from diffalign.files.paths import inside, own_file
from diffalign.files.remote import RemoteFolder, read_address

LARGEST = 1_000_000_000
"""Bytes of a member; larger ones are refused, since a zip file of a few kilobytes can hold them."""
SPARE = 1_000_000_000
"""Bytes of the disk that stay free when an archive is unpacked."""
CHUNK = 1 << 24
COMPRESSED: dict[str, Callable[[Path], BufferedIOBase]] = {
    ".tar.gz": gzip.GzipFile, ".tgz": gzip.GzipFile, ".tar.bz2": bz2.BZ2File, ".tbz2": bz2.BZ2File,
    ".tar.xz": lzma.LZMAFile, ".txz": lzma.LZMAFile,
}  # fmt: skip
TARS = (".tar", *COMPRESSED)
ARCHIVES = (*TARS, ".zip")
TABLES = (".parquet", ".arrow")
CONTAINERS = (*TABLES, *ARCHIVES)
DAMAGED = (zipfile.BadZipFile, tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError, RuntimeError,
           NotImplementedError, ValueError, LookupError)  # fmt: skip
"""What the standard library raises for a damaged archive, an encrypted one (RuntimeError), and a compression that it lacks
(NotImplementedError)."""


def kind_of(path: Path | PurePosixPath) -> str:
    """Return a file's suffix in small letters, with both parts of one such as .tar.gz."""
    name = path.name.lower()
    return next((ending for ending in COMPRESSED if name.endswith(ending)), path.suffix.lower())


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
class AddressOrigin:
    """An image at an address, which every machine can read."""

    address: str

    def read(self) -> bytes:
        return read_address(self.address)


@dataclass(frozen=True)
class BytesOrigin:
    """An image whose bytes were read already."""

    data: bytes

    def read(self) -> bytes:
        return self.data


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
        try:
            self._file = pq.ParquetFile(path, memory_map=True, page_checksum_verification=True)
        except (pa.ArrowException, OSError) as error:
            raise DiffalignError(f"{path}: not a complete parquet file ({error})") from error
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

    def others(self, row_group: int) -> list[Row | str]:
        """Return the other columns of a row group's rows, or what is wrong instead of each row."""
        count = self.row_counts()[row_group]
        names = [name for name in self._file.schema_arrow.names if name != self.column]
        try:
            # A file with nothing but images has rows without any key.
            found = self._file.read_row_group(row_group, columns=names).to_pylist() if names else []
        except UNREADABLE_CELLS as error:
            return [_unreadable(error)] * count
        return [*found, *({} for _ in range(count - len(found)))]


def _unreadable(error: Exception) -> str:
    return f"cannot be read ({' '.join(str(error).split())})"


def image_bytes(value: object, folder: Path) -> bytes:
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


class ArrowImages:
    """The image column of an arrow file that `datasets` saved; the file stays on the disk."""

    def __init__(self, path: Path, column: str) -> None:
        self.path, self.column = path, column
        self._lock = threading.Lock()
        self._batches = arrow_batches(path)

    def row_counts(self) -> list[int]:
        """Return the number of rows of each batch."""
        return [batch.num_rows for batch in self._batches]

    def read(self, batch: int, row: int) -> bytes:
        """Return an image's encoded bytes. Raises Unreadable if the row holds none."""
        try:
            with self._lock:
                value = self._batches[batch].column(self.column)[row].as_py()
        except UNREADABLE_CELLS as error:
            raise Unreadable(_unreadable(error)) from error
        return image_bytes(value, self.path.parent)

    def others(self, batch: int) -> list[Row | str]:
        """Return the other columns of a batch's rows."""
        whole = self._batches[batch]
        rest = whole.select([name for name in whole.schema.names if name != self.column])
        try:
            return rest.to_pylist() if rest.num_columns else [{} for _ in range(whole.num_rows)]
        except UNREADABLE_CELLS as error:
            return [_unreadable(error)] * whole.num_rows


@dataclass(frozen=True)
class RowOrigin:
    """An image in a row of a parquet or arrow file. part: its row group or batch; row: in that."""

    images: ParquetImages | ArrowImages
    part: int
    row: int

    def read(self) -> bytes:
        return self.images.read(self.part, self.row)


def image_rows(path: Path, column: str) -> Iterator[tuple[str, Row | str, RowOrigin]]:
    """Yield (place, the other columns, where the image is) of each row of a parquet or arrow file; no image is read.

    A row that cannot be read comes as what is wrong with it. Raises DiffalignError for a file that is not complete.
    """
    images = ArrowImages(path, column) if path.suffix.lower() == ".arrow" else ParquetImages(path, column)
    number = 0
    for part, count in enumerate(images.row_counts()):
        for row, others in zip(range(count), images.others(part), strict=True):
            yield f"{path} row {number}", others, RowOrigin(images, part, row)
            number += 1


class Archive:
    """A tar or zip file that stays open; threads read one member at a time.

    A compressed tar is unpacked into a temporary file first: to go back in it would mean to unpack it again each time.
    Raises DiffalignError for a file that is not complete.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        try:
            self._zip = zipfile.ZipFile(path) if kind_of(path) == ".zip" else None
            self._tar = None if self._zip else tarfile.open(fileobj=_plain_tar(path), mode="r:")  # noqa: SIM115 - stays open
            if self._zip:
                self.sizes = {m.filename: m.file_size for m in self._zip.infolist() if not m.is_dir()}
            else:
                assert self._tar is not None
                self.sizes = {m.name: m.size for m in self._tar.getmembers() if m.isfile()}
        except DAMAGED as error:
            raise DiffalignError(f"{path}: not a complete {kind_of(path)[1:]} file ({error})") from error

    def read(self, name: str) -> bytes:
        """Return a member's bytes. Raises Unreadable."""
        if self.sizes[name] > LARGEST:
            raise Unreadable(f"{self.sizes[name]} bytes, more than {LARGEST}")
        try:
            with self._lock:
                stream = self._zip.open(name) if self._zip else self._tar.extractfile(name) if self._tar else None
                return stream.read() if stream else b""
        except DAMAGED as error:
            raise Unreadable(f"cannot be read from {self.path.name}: {error}") from error


@dataclass(frozen=True)
class MemberOrigin:
    """An image in a tar or zip file."""

    archive: Archive | RemoteFolder
    name: str

    def read(self) -> bytes:
        return self.archive.read(self.name)


def _plain_tar(path: Path) -> IO[bytes]:
    opener = COMPRESSED.get(kind_of(path))
    if opener is None:
        return path.open("rb")
    plain = tempfile.TemporaryFile()  # noqa: SIM115 - the archive's as long as it is open
    with opener(path) as stream:
        while chunk := stream.read(CHUNK):
            _check_disk(path, len(chunk))
            plain.write(chunk)
    plain.seek(0)
    return plain


def _check_disk(path: Path, needed: int) -> None:
    temporary = Path(tempfile.gettempdir())
    if free_bytes(temporary) < needed + SPARE:
        raise DiffalignError(f"{path}: no room in {temporary} to unpack it; set TMPDIR, or unpack it yourself")


@contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """Yield a temporary folder with the files of a tar or zip file; a name that leads out of it is left out.

    Raises DiffalignError if the archive cannot be read or the disk is too small.
    """
    archive = Archive(path)
    _check_disk(path, sum(archive.sizes.values()))
    with tempfile.TemporaryDirectory(prefix="diffalign-") as made:
        folder = Path(made)
        for name in archive.sizes:
            try:
                file = inside(folder, name)
                data = archive.read(name)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(data)
            except (DiffalignError, FileExistsError, NotADirectoryError, IsADirectoryError):
                continue  # who reads the folder reports the file as missing
        shutil.rmtree(folder / "__MACOSX", ignore_errors=True)
        entries = list(folder.iterdir())
        yield entries[0] if len(entries) == 1 and entries[0].is_dir() else folder


def containers_below(folder: Path) -> list[Path]:
    """Return the containers at any depth of a folder, in the order of their paths; caches of `datasets` are left out."""
    found = [Path(place) / name for place, _, names in os.walk(folder) for name in names]
    return sorted(p for p in found if kind_of(p) in CONTAINERS and not p.name.startswith("cache-"))


def tables_below(folder: Path) -> list[Path]:
    """Return those of `containers_below` that are parquet or arrow files.

    Raises DiffalignError for a link that leads out of the folder.
    """
    return [own_file(folder, path) for path in containers_below(folder) if kind_of(path) in TABLES]
