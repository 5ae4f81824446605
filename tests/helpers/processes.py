"""Start programs as processes, one or two at a time, and run functions in forked children."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROGRAM = Path(__file__).parent / "toy_run.py"


def environment() -> dict[str, str]:
    """Return the environment of a child: one thread, no GPU, and modules found where this process finds them."""
    return {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


def command(run_dir: Path, steps: int, groups: int, micro: int, seconds: float = 0.0) -> list[str]:
    """Return the arguments that start toy_run.py; `seconds`: how long each of its steps waits for data."""
    return [str(PROGRAM), str(run_dir), *map(str, (steps, groups, micro, seconds))]


def torchrun() -> list[str]:
    """Return the command that starts a program as two processes, which meet at a free port of the machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]


def finish(line: list[str], **more: str) -> None:
    """Run a command to its end, with `more` in its environment; a failure shows the end of what it wrote."""
    done = subprocess.run(line, env={**environment(), **more}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def in_a_child(action: Callable[[], Any]) -> int:
    """Run an action in a forked process (no imports to pay for); return its process id."""
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return child
