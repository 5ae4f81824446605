"""Divide work between processes started by `accelerate launch` or `torchrun`, and gather the results."""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process's rank and the number of processes; 0 of 1 if nothing was launched."""

    rank: int = 0
    count: int = 1

    @classmethod
    def start(cls) -> "Processes":
        """Return what the launcher set, and connect the processes. Objects travel over gloo, on GPU machines too."""
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count > 1 and not dist.is_initialized():
            # A process with slower images may take long; that a process died is for the launcher to notice.
            dist.init_process_group("gloo", timeout=timedelta(days=7))
        return cls(int(os.environ.get("RANK", "0")), count)

    @property
    def main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def share(self, things: list[T]) -> list[T]:
        """Return every count-th item: each is taken by exactly one process."""
        return things[self.rank :: self.count]

    def gather(self, thing: T) -> list[T]:
        """Return what every process has, ordered by rank, on all of them. This is also a barrier."""
        if self.count == 1:
            return [thing]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, thing)
        return found

    def stop(self) -> None:
        """Disconnect the processes."""
        if self.count > 1 and dist.is_initialized():
            dist.destroy_process_group()
