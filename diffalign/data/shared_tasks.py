"""Share work between processes through the file system, without a launcher and without messages.

A task is a file that exists once it is done. The process that makes it holds an advisory lock (flock) on a file beside
it, which the kernel frees when the process dies for whatever reason. So any number of processes may run the same
command, under `accelerate launch` or in several terminals: each task is done by one of them, and the tasks of a killed
process are taken over.
"""

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from diffalign import stopping
from diffalign.files.lock import try_lock
from diffalign.progress import OnImages, say_aside

WAIT = 0.2  # seconds between checks of tasks that others are doing
SILENT = 300.0  # seconds of waiting after which a line says so: another process may be stopped
WORK_FOLDER = ".work"


@dataclass(frozen=True)
class Task:
    """A piece of work: `make` does it, `done` says whether it is done.

    `name` is the same in every process and unique among the tasks.
    """

    name: str
    done: Callable[[], bool]
    make: Callable[[], None]
    size: int = 1


def complete_all(tasks: Iterable[Task], locks: Path, on_progress: OnImages | None = None, *, kept: str = "") -> int:
    """Return when every task is done, by this process or another; return how much (in `size`) this one did.

    A signal stops the command after the task that is being made. kept: what tasks are counted in, for its message.
    """
    everything = list(tasks)
    total, mine = sum(task.size for task in everything), 0
    missing = [task for task in everything if not task.done()]
    done = total - sum(task.size for task in missing)
    if on_progress:
        on_progress(done, total)
    if kept and done:
        stopping.keep(f"{done} of {total} {kept} are")
    waited = 0.0
    while missing:
        others = []
        for task in missing:
            with try_lock(locks / task.name) as free:
                # Another process may have done it between the check above and the lock.
                if task.done():
                    done += task.size
                elif free:
                    with stopping.deferred():
                        task.make()
                    done, mine = done + task.size, mine + task.size
                    if kept:
                        stopping.keep(f"{done} of {total} {kept} are")
                    stopping.check()
                else:
                    others.append(task)
                    continue
            if on_progress:
                on_progress(done, total)
        # Wait only if every missing task is in another process's hands.
        if len(others) == len(missing):
            time.sleep(WAIT)
            waited += WAIT
            if waited >= SILENT:
                say_aside(f"waiting for other processes that hold {len(others)} tasks of {locks.parent}")
                waited = 0.0
        else:
            waited = 0.0
        missing = others
    return mine


def local_rank_and_world_size() -> tuple[int, int]:
    """Return this process's number on its machine and the number of processes, as torchrun and accelerate set them."""
    return int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
