"""One small cluster for all tests of this folder; a test finds one node with a CPU, and adds and kills others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from helpers.ray_cluster import NODE, small_cluster
from helpers.slow_reward import LOG


@pytest.fixture(scope="session")
def _cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with small_cluster(tmp_path_factory.mktemp("cluster") / "log") as made:
        made.add_node(**NODE)
        yield made


@pytest.fixture
def cluster(_cluster: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    _cluster.log.unlink(missing_ok=True)
    monkeypatch.setenv("RAY_ADDRESS", _cluster.address)
    monkeypatch.setenv(LOG, str(_cluster.log))
    return _cluster
