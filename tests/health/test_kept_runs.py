"""The rows of eighteen real runs, kept with the benchmark that made them: good ones stay unnamed, broken ones named in time."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from diffalign.health import examine

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
RUNS: dict[str, Any] = json.loads((RESULTS / "healthy-curves.json").read_text())["runs"]
QUARTER = 50
# Reversed and shuffled labels have healthy curves: they are named by the labels, before the first row.
BY_LABELS = {"reversed-sdxl", "shuffled-sdxl"}


@pytest.fixture(scope="module")
def rows() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(gzip.decompress((RESULTS / "healthy-curves-rows.json.gz").read_bytes()))
    return found


def test_ten_good_runs_and_eight_broken_ones(rows: dict[str, Any]) -> None:
    good = [name for name, run in RUNS.items() if run["kind"]["good"]]
    assert len(good) == 10 and len(RUNS) == 18 and rows.keys() == RUNS.keys()


@pytest.mark.parametrize("name", sorted(RUNS))
def test_what_a_run_is_called(name: str, rows: dict[str, Any]) -> None:
    found = {f.name: f.step for f in examine(rows[name]["metrics"], rows[name]["validation"])}
    kind = RUNS[name]["kind"]
    if kind["good"] or name in BY_LABELS:
        assert found == {}
    else:
        assert min(found.get(called, QUARTER + 1) for called in kind["called"]) <= QUARTER
    written = {f["name"]: f["step"] for f in RUNS[name]["findings"] if f["step"]}
    assert found == written
