"""A Ray cluster of small nodes on this machine, for tests that run where Ray is installed (`make test-ray`)."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from helpers.slow_reward import LOG, PATIENCE

NODE = {"num_cpus": 1, "object_store_memory": 100_000_000}


@contextmanager
def small_cluster(log: Path) -> Iterator[Any]:
    """Yield ray's Cluster with a head that has no CPU of its own, so that every node with actors can be killed.

    Its processes find modules where this one does, and write what they do into `log`.
    """
    from ray.cluster_utils import Cluster

    changed = {"PYTHONPATH": os.pathsep.join(sys.path), LOG: str(log), "RAY_USAGE_STATS_ENABLED": "0"}
    before = {key: os.environ.get(key) for key in changed}
    os.environ.update(changed)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    head = {**NODE, "num_cpus": 0, "include_dashboard": False, "ray_client_server_port": port}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.log = log
    cluster._shutdown_at_exit = False  # it would set signal handlers, which only the main thread may
    cluster.client = f"ray://127.0.0.1:{port}"
    try:
        yield cluster
    finally:
        cluster.shutdown()
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})


def when(done: Callable[[], bool], action: Callable[[], Any]) -> threading.Thread:
    """Do something once `done()`, while the command goes on."""

    def wait() -> None:
        deadline = time.monotonic() + PATIENCE
        while not done():
            if time.monotonic() > deadline:
                return
            time.sleep(0.02)
        action()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread
