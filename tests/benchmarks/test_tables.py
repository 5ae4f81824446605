"""The tables of benchmarks state no interval from few prompts, and their pictures draw none."""

from __future__ import annotations

import pytest

from helpers.run_directory import comparison


@pytest.mark.parametrize(("prompts", "intervals"), [([3], 0), ([7, 3], 0), ([8, 3], 1), ([256, 64], 2)])
def test_objectives(prompts: list[int], intervals: int) -> None:
    from shared.objectives_report import picture, table

    rows = [
        {
            "method": f"m{n}", "shuffled": False, "base": "shapes-sd3", "base_diversity": 0.1, "drift": None, "diversity": 0.1,
            "steps": 10, "cpu_seconds_per_step": 1.0,
            **{f"held_out {c}": {**comparison(0.2), "prompts": n} for c in ("geneval.dense", "geneval.exact")},
        }
        for n in prompts
    ]  # fmt: skip
    text, svg = table(rows), picture(rows)
    assert text.count("+0.100 to +0.300") == 2 * intervals
    assert text.count("for an interval") == 2 * (len(prompts) - intervals)
    assert svg.count('stroke-width="2"') == intervals and svg.count("<circle") == len(prompts) and "None" not in svg
