"""Numbered records of tensors in a folder, made by any number of processes and checked when they are read.

    00000.safetensors   some records, tensors "<number>/<name>"; the metadata holds a CRC-32 of each record
    index.json          written last: what the caller says of all records, and the size of each file in bytes

Which records a file holds follows from their number alone, so the bytes of a finished folder do not depend on how many
processes made it, nor on kills. A complete file is never made again unless it is damaged.
"""

import json
import shutil
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffalign import stopping
from diffalign.data.shared_tasks import Task, complete_all
from diffalign.errors import DiffalignError
from diffalign.files import reading, replacing, write_whole
from diffalign.files.checksums import check_crc, check_seal, crc_metadata, sealed, stored_crcs, tensor_crc
from diffalign.files.parse import parse_json
from diffalign.progress import OnImages

INDEX = "index.json"
FILES, MOST_RECORDS = 64, 128  # so many files, unless one would hold more records than this
OPEN_FILES = 64

MEND = "delete it, and the same command makes it again"

Record = dict[str, Tensor]


class Reader(Protocol):
    """What reads records by number."""

    def read(self, number: int) -> Record:
        """Return the tensors of a record by name."""
        ...


class Records:
    """The records of a finished folder, memory-mapped. Each is checked when it is first read."""

    def __init__(self, folder: Path, index: dict[str, Any]) -> None:
        self.folder, self.each = folder, index["records_per_file"]
        self._checked: set[int] = set()
        self._open: OrderedDict[int, Any] = OrderedDict()

    def read(self, number: int) -> Record:
        """Return the tensors of a record by name. Raises DiffalignError where the file is damaged."""
        place = number // self.each
        path = _file(self.folder, place)
        with reading(path, mend="delete this file, and the same command makes it again"):
            if place not in self._open:
                self._open[place] = _File(path)
                if len(self._open) > OPEN_FILES:
                    self._open.popitem(last=False)
            self._open.move_to_end(place)
            found = self._open[place].read(number)
            if number not in self._checked:
                self._open[place].check(number, found)
                self._checked.add(number)
        return found


class _File:
    """One file of records, open."""

    def __init__(self, path: Path) -> None:
        self._stored: Any = safe_open(path, "pt")  # safetensors has no public type for it
        self.names: dict[int, list[str]] = {}
        for key in sorted(self._stored.keys()):
            number, _, name = key.partition("/")
            self.names.setdefault(int(number), []).append(name)
        self._crcs = stored_crcs(self._stored.metadata())

    def read(self, number: int) -> Record:
        return {name: self._stored.get_tensor(f"{number}/{name}") for name in self.names[number]}

    def check(self, number: int, record: Record) -> None:
        """Raise ValueError where a record is not as it was written."""
        if str(number) not in self._crcs:
            raise ValueError(f"no checksum of record {number}")
        check_crc(str(number), _crc(record), self._crcs)


def read_index(folder: Path) -> dict[str, Any] | None:
    """Return the index of a finished folder; None if it is not finished, or a file lacks or has another size."""
    try:
        index: dict[str, Any] = parse_json((folder / INDEX).read_text(encoding="utf-8"))
        check_seal(index)
        sizes = index.get("files", {}).items()
        return index if all((folder / name).stat().st_size == size for name, size in sizes) else None
    except (OSError, ValueError, AttributeError):
        return None


def finished_index(folder: Path) -> dict[str, Any]:
    """Return the index of a finished folder. Raises DiffalignError where there is none."""
    index = read_index(folder)
    if index is None:
        raise DiffalignError(f"{folder / INDEX} cannot be read, or a file beside it lacks; {MEND}")
    return index


def made_bytes(folder: Path) -> int:
    """Return the bytes of the files of records that are there."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def share(mine: int, total: int) -> str:
    """Return how many of all records this process made, in words."""
    return str(total) if mine == total else f"{mine} of {total}"


def make_records(
    folder: Path,
    count: int,
    make: Callable[[int], Record],
    facts: dict[str, Any],
    on_progress: OnImages | None = None,
) -> int:
    """Make the records 0 to `count` - 1 that `folder` lacks, together with other processes; return how many this one made.

    make: returns a record by number. facts: goes into the index. Files that are there are checked, and made again if
    they are damaged. Raises DiffalignError where a file cannot be written.
    """
    shutil.rmtree(folder.with_name(f"{folder.name}.part"), ignore_errors=True)  # unfinished work of earlier versions
    each = min(MOST_RECORDS, -(-count // FILES))
    places = range(-(-count // each))
    for place in places:
        _remove_if_damaged(_file(folder, place))

    def task(place: int) -> Task:
        path, numbers = _file(folder, place), range(place * each, min((place + 1) * each, count))

        def write() -> None:
            records = {}
            for number in numbers:
                records[number] = make(number)
                stopping.check()  # a file may take minutes; what is kept are whole ones
            tensors = {
                f"{n}/{name}": value.contiguous() for n, record in records.items() for name, value in record.items()
            }
            with replacing(path) as part:
                save_file(tensors, part, crc_metadata({str(n): _crc(record) for n, record in records.items()}))

        return Task(f"{place:05d}", path.is_file, write, len(numbers))

    def finish() -> None:
        sizes = {_file(folder, place).name: _file(folder, place).stat().st_size for place in places}
        for path in folder.iterdir():
            if path.is_file() and path.name not in sizes:
                path.unlink()  # of a layout of earlier versions that was damaged
        index = {**facts, "records_per_file": each, "files": sizes}
        write_whole(folder / INDEX, json.dumps(sealed(index)))

    locks = folder / ".locks"
    mine = complete_all([task(place) for place in places], locks, on_progress, kept="records")
    complete_all([Task("index", lambda: read_index(folder) is not None, finish)], locks)
    shutil.rmtree(locks, ignore_errors=True)
    return mine


def _remove_if_damaged(path: Path) -> None:
    """Delete a file of records that is not whole, as a power cut leaves it."""
    if not path.is_file():
        return
    try:
        with reading(path, mend="it is made again"):
            file = _File(path)
            for number in file.names:
                file.check(number, file.read(number))
    except DiffalignError:
        path.unlink(missing_ok=True)


def _crc(record: Record) -> int:
    """Return the CRC-32 of a record: names, types and shapes, then the bytes."""
    kinds = json.dumps([(name, str(record[name].dtype), list(record[name].shape)) for name in sorted(record)])
    return tensor_crc((record[name] for name in sorted(record)), zlib.crc32(kinds.encode()))


def _file(folder: Path, place: int) -> Path:
    return folder / f"{place:05d}.safetensors"
