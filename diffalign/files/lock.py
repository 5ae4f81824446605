"""Locks between processes: advisory file locks (flock), which the kernel frees when a process dies for whatever reason.

`try_lock` is the lock of one piece of work that processes share (`data/shared_tasks.py`). `writing_folder` and
`writing_file` keep a second command out of what a first one is writing.

A lock holds between processes of one machine on every local disk. On NFS it also holds between machines, unless the
disk is mounted with `nolock` or `local_lock`. Where a file system has no locks (Lustre without `flock`), one line says
so, and the command runs without.
"""

import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict

from diffalign.errors import DiffalignError
from diffalign.progress import say_aside

LOCK_FILE = ".lock"
"""The lock of a folder, in the folder; it is deleted when its holder ends."""

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
TRIES, WAIT = 5, 0.1  # how often a lock that is held is tried again, and seconds between
MOST_OPENED = 100  # how often a lock's file is opened whose folder another process deletes meanwhile
_said: set[int] = set()


class Holder(TypedDict):
    """Who holds a lock, as the lock's file says it."""

    host: str
    pid: int
    command: str
    since: str


@contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Yield whether this process got the lock `path`; it is held until the block ends. Never waits."""
    handle = _open(path)
    try:
        yield _locked(handle, path, fcntl.LOCK_EX)
    finally:
        os.close(handle)  # frees the lock


@contextmanager
def writing_folder(folder: Path | None, key: str, *, shared: bool = False) -> Iterator[None]:
    """Hold the lock of a folder that this command writes; make the folder where it does not exist.

    folder: None for a command that writes nothing. key: the option that names the folder, for messages. shared: for
    commands that divide their work between processes; they exclude only commands that are not shared. Of the processes
    of one launch, the first takes the lock. Raises DiffalignError where another command holds it, naming that one, and
    for a folder that cannot be made.
    """
    if folder is None:
        yield
        return
    with _writing(folder / LOCK_FILE, f"{key} {folder}", shared):
        yield


@contextmanager
def writing_file(path: Path | None, key: str) -> Iterator[None]:
    """Hold the lock of a file that this command writes, as `writing_folder` does; None: no file, no lock."""
    if path is None:
        yield
        return
    if not path.name:
        raise DiffalignError(f"{key} {path}: a folder; name a file")
    with _writing(path.with_name(f".{path.name}{LOCK_FILE}"), f"{key} {path}", shared=False):
        yield


def holds_files(folder: Path) -> bool:
    """Return whether a folder holds anything but the lock of the command that writes it."""
    return folder.is_dir() and any(path.name != LOCK_FILE for path in folder.iterdir())


@contextmanager
def _writing(lock: Path, what: str, shared: bool) -> Iterator[None]:
    if not shared and int(os.environ.get("RANK", "0")):
        yield
        return
    made: list[Path] = []
    try:
        made = [folder for folder in lock.parents if not folder.exists()]
        handle = _take(lock, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiffalignError(f"{what} cannot be written ({error.strerror}); choose another one") from error
    if handle is None:
        raise DiffalignError(f"{what} is in use by {_holder(lock)}; wait until it ends, or choose another one")
    try:
        _sign(handle, shared)
        yield
    finally:
        # Deleted only while nobody else holds it: another process that waits at the old file sees that it is gone.
        if not shared or _locked(handle, lock, fcntl.LOCK_EX):
            lock.unlink(missing_ok=True)
        os.close(handle)
        for folder in made:  # a command that is refused for another reason leaves no empty folder
            try:
                folder.rmdir()
            except OSError:
                break


def _take(lock: Path, mode: int) -> int | None:
    """Return an open handle that holds the lock; None if another process has it."""
    tries = 0
    while True:
        handle = _open(lock)
        if not _locked(handle, lock, mode):
            os.close(handle)
            # A holder that is just ending has it for a moment longer.
            if (tries := tries + 1) == TRIES:
                return None
            time.sleep(WAIT)
            continue
        try:
            # The holder before may have deleted the file after it was opened here.
            if os.path.samestat(os.fstat(handle), lock.stat()):
                return handle
        except FileNotFoundError:
            pass
        os.close(handle)


def _open(path: Path) -> int:
    """Open a lock's file. A process that has finished may delete the folder between the two steps."""
    for left in range(MOST_OPENED - 1, -1, -1):
        path.parent.mkdir(parents=True, exist_ok=True)  # `_writing` names the option where that fails
        try:
            # A link in a folder of others might lead to any file.
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except FileNotFoundError:
            if not left:  # a folder in which no file can be made, such as /proc
                raise
    raise AssertionError


def _locked(handle: int, path: Path, mode: int) -> bool:
    """Return whether the handle now holds the lock in `mode`. Where the file system has no locks: True."""
    try:
        fcntl.flock(handle, mode | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        disk = os.fstat(handle).st_dev
        if disk not in _said:
            say_aside(
                f"{path.parent}: this file system has no locks ({error.strerror}); run one command at a time there"
            )
        _said.add(disk)
    return True


def _sign(handle: int, shared: bool) -> None:
    """Write into the lock's file who holds it; a shared lock has a line for each holder."""
    holder = Holder(
        host=socket.gethostname(), pid=os.getpid(), command=_command(), since=time.strftime("%Y-%m-%d %H:%M:%S")
    )
    if not shared:
        os.ftruncate(handle, 0)
    os.lseek(handle, 0, os.SEEK_END)
    os.write(handle, f"{json.dumps(holder)}\n".encode())


def _command() -> str:
    """Return the command in short. Values are left out, since a token may be among them."""
    first = Path(sys.argv[0])
    name = first.parent.name if first.name == "__main__.py" else first.name
    return " ".join([name, *(word for word in sys.argv[1:4] if "=" not in word)])


def _holder(lock: Path) -> str:
    """Return in words which process holds a lock."""
    for _ in range(TRIES):
        for line in _lines(lock):
            try:
                held: Holder = json.loads(line)
                if held["host"] != socket.gethostname() or _alive(held["pid"]):
                    return f"pid {held['pid']} on {held['host']} since {held['since']} ({held['command']})"
            except (ValueError, KeyError, TypeError):
                continue
        time.sleep(WAIT)  # it has the lock and has not signed yet
    return "another process"


def _lines(lock: Path) -> list[str]:
    try:
        return lock.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
