"""Sharing work between processes through the file system, with no launcher and no messages.

A piece of work is a file that exists once it is done. Whoever makes it holds an advisory lock (flock) on a file beside it,
which the kernel frees when its holder dies, however it dies. So any number of processes may run the same command, under
`accelerate launch` or in as many terminals, each piece is made by one of them, and a killed one's pieces are taken over.
"""

import fcntl
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

WAIT = 0.2  # seconds between looks at what others are making
WORK_FOLDER = ".work"


@dataclass(frozen=True)
class Task:
    """`make` brings about what `done` asks for. `name` is the same in every process, and unlike any other task's."""

    name: str
    done: Callable[[], bool]
    make: Callable[[], None]
    size: int = 1


@contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Whether this process has the lock `path`, until the block ends; never waits."""
    handle = _open(path)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)  # frees the lock


def _open(path: Path) -> int:
    """The lock's file. A process that is through may delete the folder between the two steps."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            continue


def complete_all(tasks: Iterable[Task], locks: Path, on_progress: Callable[[int, int], None] | None = None) -> int:
    """Return when every task is done, by this process or another; how much of the work (in `size`) this one did."""
    everything = list(tasks)
    total, mine = sum(task.size for task in everything), 0
    missing = [task for task in everything if not task.done()]
    done = total - sum(task.size for task in missing)
    if on_progress:
        on_progress(done, total)
    while missing:
        others = []
        for task in missing:
            with try_lock(locks / task.name) as free:
                # Another process may have made it between the look above and the lock.
                if task.done():
                    done += task.size
                elif free:
                    task.make()
                    done, mine = done + task.size, mine + task.size
                else:
                    others.append(task)
                    continue
            if on_progress:
                on_progress(done, total)
        if len(others) == len(missing):
            time.sleep(WAIT)
        missing = others
    return mine


def local_rank_and_world_size() -> tuple[int, int]:
    """(this process's number on its machine, how many there are in all), as torchrun and accelerate say."""
    return int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
