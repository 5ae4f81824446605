"""Several processes under `accelerate launch` or `torchrun`: who takes what, and a gather at the end."""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """rank 0 of 1 where nothing was launched."""

    rank: int = 0
    count: int = 1

    @classmethod
    def start(cls) -> "Processes":
        """What the launcher says. Objects travel over gloo, on GPU machines as well."""
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count > 1 and not dist.is_initialized():
            # A process that has the slower pictures may be waited for long; a dead one is the launcher's to notice.
            dist.init_process_group("gloo", timeout=timedelta(days=7))
        return cls(int(os.environ.get("RANK", "0")), count)

    @property
    def main(self) -> bool:
        return self.rank == 0

    def share(self, things: list[T]) -> list[T]:
        """Every count-th thing: each is taken by exactly one process."""
        return things[self.rank :: self.count]

    def gather(self, thing: T) -> list[T]:
        """What every process has, in the order of ranks, on all of them. Also a barrier."""
        if self.count == 1:
            return [thing]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, thing)
        return found

    def stop(self) -> None:
        if self.count > 1 and dist.is_initialized():
            dist.destroy_process_group()
