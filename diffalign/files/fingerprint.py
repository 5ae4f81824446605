"""Hash large files by samples of their bytes: moved content has the same hash, and nothing takes minutes to read."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

SAMPLES, SAMPLE_BYTES = 16, 65536
DIGITS = 16


class Digest(Protocol):
    """A hash that takes bytes."""

    def update(self, data: bytes, /) -> None: ...


def add_samples(digest: Digest, name: str, file: Path) -> None:
    """Add a file to a hash: the name that it counts under, its size, and samples over all of it."""
    size = file.stat().st_size
    digest.update(f"\0{name}\0{size}\0".encode())
    with file.open("rb") as stream:
        for part in range(SAMPLES):
            stream.seek(part * max(0, size - SAMPLE_BYTES) // (SAMPLES - 1))
            digest.update(stream.read(SAMPLE_BYTES))


def fingerprint(parts: Iterable[bytes] = (), files: Iterable[tuple[str, Path]] = ()) -> str:
    """Return a hash of bytes and of files (the name that each counts under, and where it lies): 16 hex digits."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    for name, file in files:
        add_samples(digest, name, file)
    return digest.hexdigest()[:DIGITS]


def folder_fingerprint(folder: Path) -> str:
    """Return a hash of all files in a folder but hidden ones, wherever it lies."""
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    shown = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    return fingerprint(files=((name.as_posix(), folder / name) for name in shown))
