"""Keep the output of `diffalign score` at an address: work on a copy, and send what is new there every few seconds.

ADDRESS             the output; written at the end of a run
ADDRESS.journal/    new lines of the journal, in files of their own, since object stores do not append
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from diffalign.files import write_whole
from diffalign.files.remote import RemoteFolder, check_writable, exists, join, read_address, remove_below, upload

EVERY = 30.0
"""Seconds between two files of the journal: what a kill costs at most."""


class Mirror:
    """The copy of an output and its journal, and what was sent of it. path: the output's place on this machine."""

    def __init__(self, address: str, folder: Path) -> None:
        self.address, self.path = address, folder / PurePosixPath(address).name
        self.journal = self.path.with_name(self.path.name + ".journal")
        self._sent: dict[str, int] = {}  # bytes of each file of the journal that are at the address
        self._last, self._parts = time.monotonic(), 0
        check_writable(address)
        if exists(address):
            self.path.write_bytes(read_address(address))
        if exists(f"{address}.journal"):
            there = RemoteFolder(f"{address}.journal")
            self.journal.mkdir()
            for name in there.sizes:
                if "/" not in name and name.endswith(".jsonl"):
                    (self.journal / name).write_bytes(there.read(name))
                    self._sent[name] = (self.journal / name).stat().st_size
                    self._parts += 1

    def sync(self, now: bool = False) -> None:
        """Send the new lines of the journal, if the last time is long enough ago or it must be `now`."""
        if not now and time.monotonic() - self._last < EVERY:
            return
        self._last = time.monotonic()
        for path in sorted(self.journal.glob("*.jsonl")) if self.journal.is_dir() else []:
            data = path.read_bytes()
            fresh = data[self._sent.get(path.name, 0) :]
            if fresh:
                part = self.path.with_name("part.jsonl")
                write_whole(part, fresh.decode())
                upload(part, join(f"{self.address}.journal", f"{time.time_ns()}-{self._parts:06d}.jsonl"))
                self._sent[path.name], self._parts = len(data), self._parts + 1

    def finish(self) -> None:
        """Send the output; delete its journal where the run has deleted the copy's."""
        upload(self.path, self.address)
        if not self.journal.exists():
            remove_below(f"{self.address}.journal")
        else:
            self.sync(now=True)


@contextmanager
def mirror(address: str) -> Iterator[Mirror]:
    """Yield the working copy of an output; whatever ends the block, the journal is sent first."""
    with tempfile.TemporaryDirectory(prefix="diffalign-") as folder:
        made = Mirror(address, Path(folder))
        try:
            yield made
        finally:
            made.sync(now=True)
