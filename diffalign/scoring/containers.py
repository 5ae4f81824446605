"""Images in tar and zip files and in arrow files of `datasets`: where they are, and the prompts that stand beside them."""

import tarfile
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa

from diffalign.data.prompts_beside import TEXTS, prompt_in_text
from diffalign.data.tables import UNREADABLE_CELLS
from diffalign.errors import DiffalignError
from diffalign.files.images import SUFFIXES, Unreadable
from diffalign.files.parse import parse_json
from diffalign.rewards.facts import geneval_facts
from diffalign.scoring.items import image_bytes

LARGEST = 1_000_000_000
"""Bytes of a member; larger ones are refused, since a zip file of a few kilobytes can hold them."""
LARGEST_TEXT = 1_000_000


class Archive:
    """A tar or zip file that stays open; threads read one member at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        try:
            self._zip = zipfile.ZipFile(path) if path.suffix.lower() == ".zip" else None
            self._tar = None if self._zip else tarfile.open(path, "r:")  # noqa: SIM115 - stays open
            if self._zip:
                self.sizes = {m.filename: m.file_size for m in self._zip.infolist() if not m.is_dir()}
            else:
                assert self._tar is not None
                self.sizes = {m.name: m.size for m in self._tar.getmembers() if m.isfile()}
        except (zipfile.BadZipFile, tarfile.TarError, OSError, EOFError) as error:
            raise DiffalignError(f"{path}: not a complete {path.suffix[1:]} file ({error})") from error

    def read(self, name: str) -> bytes:
        """Return a member's bytes. Raises Unreadable."""
        if self.sizes[name] > LARGEST:
            raise Unreadable(f"{self.sizes[name]} bytes, more than {LARGEST}")
        try:
            with self._lock:
                stream = self._zip.open(name) if self._zip else self._tar.extractfile(name) if self._tar else None
                return stream.read() if stream else b""
        except (
            zipfile.BadZipFile,
            tarfile.TarError,
            OSError,
            EOFError,
            RuntimeError,
            NotImplementedError,
            ValueError,
        ) as error:
            raise Unreadable(f"cannot be read from {self.path.name}: {error}") from error


@dataclass(frozen=True)
class MemberOrigin:
    """An image in a tar or zip file."""

    archive: Archive
    name: str

    def read(self) -> bytes:
        return self.archive.read(self.name)


@dataclass(frozen=True)
class Member:
    """An image in an archive, with its prompt and GenEval's facts, and why a file that should hold them is unreadable."""

    origin: MemberOrigin
    prompt: str | None
    facts: dict[str, Any]
    fault: str


def archive_members(path: Path) -> Iterator[Member]:
    """Yield the images of a tar or zip file in the order of their names; webdataset's layout is one.

    The prompt of `a.jpg` is in `a.txt`, `a.caption` or `a.json`.
    """
    archive = Archive(path)
    for name in sorted(archive.sizes):
        if PurePosixPath(name).suffix.lower() not in SUFFIXES or PurePosixPath(name).name.startswith("._"):
            continue
        prompt, facts, fault = _beside(archive, name)
        yield Member(MemberOrigin(archive, name), prompt, facts, fault)


def _beside(archive: Archive, name: str) -> tuple[str | None, dict[str, Any], str]:
    prompt, facts, fault = None, {}, ""
    # webdataset's key ends at the first dot of the name; a plain folder's at the last.
    folder, _, base = name.rpartition("/")
    stems = dict.fromkeys(
        f"{folder}/{stem}" if folder else stem for stem in (base.rpartition(".")[0], base.partition(".")[0])
    )
    for suffix in (*TEXTS, ".json"):
        file = next((f"{stem}{suffix}" for stem in stems if f"{stem}{suffix}" in archive.sizes), None)
        if file is None or archive.sizes[file] > LARGEST_TEXT:
            continue
        try:
            data = archive.read(file)
            prompt = prompt or prompt_in_text(data, suffix)
            if suffix == ".json" and isinstance(row := parse_json(data), dict):
                facts = geneval_facts(row)
        except (Unreadable, ValueError) as error:
            fault = fault or f"{PurePosixPath(file).name}: {error}"
    return prompt, facts, fault


class ArrowImages:
    """The image column of an arrow file that `datasets` saved, read a batch of rows at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        try:
            self._batches = list(_reader(pa.memory_map(str(path))))
        except (pa.ArrowException, OSError) as error:
            raise DiffalignError(f"{path}: not a complete arrow file ({error})") from error

    @property
    def names(self) -> list[str]:
        """The columns; none for a file without rows."""
        return list(self._batches[0].schema.names) if self._batches else []

    def rows(self, without: str) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """Yield (batch, row, the other columns) of every row."""
        for n, batch in enumerate(self._batches):
            try:
                rest = batch.select([name for name in batch.schema.names if name != without]).to_pylist()
            except UNREADABLE_CELLS as error:
                raise DiffalignError(f"{self.path}: cannot be read: {' '.join(str(error).split())}") from error
            yield from ((n, row, rest[row] if rest else {}) for row in range(batch.num_rows))

    def value(self, batch: int, row: int, column: str) -> Any:
        """Return the cell of an image."""
        with self._lock:
            return self._batches[batch].column(column)[row].as_py()


@dataclass(frozen=True)
class CellOrigin:
    """An image in a row of an arrow file."""

    images: ArrowImages
    batch: int
    row: int
    column: str

    def read(self) -> bytes:
        return image_bytes(self.images.value(self.batch, self.row, self.column), self.images.path.parent)


def _reader(source: Any) -> Iterator[pa.RecordBatch]:
    try:
        yield from pa.ipc.open_stream(source)
    except pa.ArrowInvalid:
        source.seek(0)
        file = pa.ipc.open_file(source)
        yield from (file.get_batch(i) for i in range(file.num_record_batches))
