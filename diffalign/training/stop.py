"""Whether a signal asks a run to stop: the same answer in every process, at the same step."""

from datetime import timedelta

import torch
import torch.distributed as dist

from diffalign import stopping

LONG = timedelta(days=7)
"""The main process may validate for hours before it answers."""


class StopSignal:
    """The signals of all processes of a run. One process alone looks at its own; several ask each other after every step.

    They ask through the CPUs, so no process waits for its GPU.
    """

    def __init__(self) -> None:
        self._group: dist.ProcessGroup | None = None
        if dist.is_initialized():
            group = dist.new_group(backend="gloo", timeout=LONG)
            assert isinstance(group, dist.ProcessGroup)  # this process is in it, as all are
            self._group = group

    def asked(self) -> bool:
        """Return whether any process was asked to stop. Every process calls it at the same step."""
        own = stopping.asked()
        if self._group is None:
            return own
        flag = torch.tensor([int(own)])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return bool(flag.item())
