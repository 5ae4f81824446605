"""Read and write files at an address, such as s3://, gs://, hf:// or file://, through fsspec; and tell it from a path.

A name below an address comes from whoever wrote there, so one that could lead out of it is left out.
"""

from __future__ import annotations

import posixpath
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from diffalign.errors import DiffalignError, brief
from diffalign.files import check_space
from diffalign.files.images import MAX_BYTES, Unreadable

ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def is_address(text: object) -> bool:
    """Return whether a text is an address and not a path: it begins with a scheme and `://`."""
    return isinstance(text, str) and ADDRESS.match(text) is not None


def join(address: str, name: str) -> str:
    """Return the address of a name below another."""
    return f"{address.rstrip('/')}/{name}"


def read_address(address: str) -> bytes:
    """Return all bytes at an address. Raises Unreadable."""
    try:
        fs, path = _opened(address)
        if (size := fs.size(path)) is not None and size > MAX_BYTES:
            raise Unreadable(f"{size} bytes, more than {MAX_BYTES}")
        found: bytes = fs.cat_file(path)
        return found
    except Unreadable:
        raise
    except FileNotFoundError as error:
        raise Unreadable("No such file") from error
    except Exception as error:  # every file system has its own errors
        raise Unreadable(brief(error)) from error


class RemoteFolder:
    """The files below an address, with the interface of an archive.

    path: its address, or that of the folder around a file or a pattern. sizes: name below `path` -> bytes. Raises
    DiffalignError where nothing is there, or it cannot be listed.
    """

    def __init__(self, address: str) -> None:
        with _reading(address):
            fs, root = _opened(address)
            if any(c in root for c in "*?[") and not fs.exists(root):
                found, self.path = fs.glob(root, detail=True), re.split(r"[*?\[]", address, maxsplit=1)[0]
                self.path = self.path.rpartition("/")[0]
            else:
                found, self.path = fs.find(root, detail=True), address.rstrip("/")
                if set(found) == {root}:  # a file is found below itself
                    self.path = self.path.rpartition("/")[0]
            _, root = _opened(self.path)
            names = {path.removeprefix(root).lstrip("/"): info for path, info in found.items()}
        files = {n: int(i.get("size") or 0) for n, i in names.items() if i.get("type") == "file" and _stays_inside(n)}
        if not files:
            raise DiffalignError(f"{address}: no file there")
        self.sizes = dict(sorted(files.items()))
        self._kept: dict[str, bytes] = {}

    def address(self, name: str) -> str:
        """Return the address of a file."""
        return join(self.path, name)

    def fetch(self, names: list[str]) -> None:
        """Read small files at the same time and keep them; those that fail are read again when they are asked for."""
        if names:
            with _reading(self.path):
                fs, root = _opened(self.path)
                paths = {posixpath.join(root.rstrip("/"), name): name for name in names}
                found = fs.cat(list(paths), on_error="return")
            self._kept |= {paths[p]: data for p, data in found.items() if isinstance(data, bytes) and p in paths}

    def read(self, name: str) -> bytes:
        """Return a file's bytes. Raises Unreadable."""
        return self._kept[name] if name in self._kept else read_address(self.address(name))


@cache
def local_copy(address: str) -> Path:
    """Return a copy of the file at an address in a temporary folder, which ends with the process.

    Raises DiffalignError where it cannot be read, or does not fit on the disk.
    """
    with _reading(address):
        fs, path = _opened(address)
        place = Path(tempfile.mkdtemp(dir=_copies())) / posixpath.basename(path)
        check_space(place.parent, int(fs.size(path) or 0), f"a copy of {address} in")
        fs.get_file(path, str(place))
    return place


def upload(path: Path, address: str) -> None:
    """Write a file, or the files of a folder, to an address; a file appears under its name only when it is complete.

    Hidden files and folders, such as locks and unfinished work, stay here.
    """
    with _reading(address):
        fs, target = _opened(address)
        for file in [path] if path.is_file() else _shown_files(path):
            place = target if path.is_file() else posixpath.join(target, file.relative_to(path).as_posix())
            fs.makedirs(posixpath.dirname(place), exist_ok=True)
            # Object stores show an object when it is complete; on a disk the name would be there before.
            if "file" in _protocols(fs):
                fs.put_file(str(file), place + ".part")
                fs.mv(place + ".part", place)
            else:
                fs.put_file(str(file), place)


def _shown_files(folder: Path) -> list[Path]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in files if not any(p.startswith(".") for p in path.relative_to(folder).parts))


def check_writable(address: str) -> None:
    """Raise DiffalignError where no file can be written and deleted at an address; call it before work that would be lost."""
    with _reading(address):
        fs, path = _opened(address)
        fs.makedirs(posixpath.dirname(path), exist_ok=True)
        fs.pipe_file(path + ".part", b"")
        fs.rm_file(path + ".part")


def remove_below(address: str) -> None:
    """Delete a folder at an address, if it is there."""
    with _reading(address):
        fs, path = _opened(address)
        if fs.exists(path):
            fs.rm(path, recursive=True)


def exists(address: str) -> bool:
    """Return whether something is at an address. Raises DiffalignError where that cannot be found out."""
    with _reading(address):
        fs, path = _opened(address)
        return bool(fs.exists(path))


@cache
def _opened(address: str) -> tuple[Any, str]:
    """Return the file system of an address, and the path in it."""
    import fsspec.core

    parts = urlsplit(address)
    if "::" in address or ("?" in address and parts.scheme in ("http", "https")):
        raise DiffalignError(f"{parts.scheme}://{parts.hostname}: a chain or a query is not read; give a plain address")
    if parts.password:
        raise DiffalignError(
            f"{parts.scheme}://{parts.hostname}: no password belongs in an address, as results name it; set the variables "
            "of the environment that its fsspec package reads"
        )
    try:
        fs, path = fsspec.core.url_to_fs(address)
    except ImportError as error:  # fsspec says what to install in words, and its cause which module is not there
        missing = getattr(error.__cause__ or error, "name", None)
        if not missing:
            raise
        package = missing.partition(".")[0]
        raise DiffalignError(
            f"{parts.scheme}://: {package} is not installed, which reads such addresses; pip install {package}"
        ) from error
    return fs, path.rstrip("/") if len(path) > 1 else path


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _stays_inside(name: str) -> bool:
    parts = name.split("/")
    return bool(name) and "\0" not in name and not {"", ".", ".."} & set(parts)


@contextmanager
def _reading(address: str) -> Iterator[None]:
    """Turn what a file system raises into one line with the address."""
    try:
        yield
    except DiffalignError:
        raise
    except FileNotFoundError as error:
        raise DiffalignError(f"{address}: no such file or folder") from error
    except Exception as error:  # every file system has its own errors
        raise DiffalignError(f"{address}: {brief(error)}") from error


@cache
def _copies() -> str:
    """Make the folder of all local copies of this process."""
    import atexit

    made = tempfile.mkdtemp(prefix="diffalign-")
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made
