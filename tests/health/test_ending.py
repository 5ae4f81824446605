"""What is said of a run when it ends: too short to judge, not finished, groups that weigh nothing, an average of its start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from diffalign.health import LabelledGroup, examine_labels
from diffalign.report.render import write_report
from helpers import toy


def run(run_dir: Path, said: list[str] | None = None, **sections: Any) -> None:
    say = (lambda _: None) if said is None else said.append
    config = toy.toy_config(run_dir, **sections)
    toy.train(config, backbone=toy.ToyBackbone(), source=toy.ToySource(), say=say)


def found_in(run_dir: Path) -> dict[str, str]:
    return {one["name"]: one["measured"] for one in json.loads((run_dir / "health.json").read_text())}


@pytest.mark.parametrize("steps", [1, 6, 19])
def test_a_short_run_is_not_called_healthy(tmp_path: Path, steps: int) -> None:
    said: list[str] = []
    run(tmp_path, said, train={"steps": steps})
    assert said[-1] == f"health: too short to judge ({steps} of 20 logged steps)"
    assert found_in(tmp_path) == {"too_short": f"{steps} of 20 logged steps"}
    page = write_report(tmp_path).read_text()
    assert "Too short to judge" in page and "Nothing found" not in page


def test_rows_that_are_not_logged_do_not_count(tmp_path: Path) -> None:
    run(tmp_path, train={"steps": 40, "log_every": 10})
    assert found_in(tmp_path) == {"too_short": "4 of 20 logged steps"}


@pytest.mark.parametrize(("stop", "steps"), [(6, 30), (25, 30), (1, 400)])
def test_a_run_that_stopped_says_where(tmp_path: Path, stop: int, steps: int) -> None:
    """Also one that was killed, whose health.json knows nothing of it."""
    run(tmp_path, train={"steps": stop})
    config = tmp_path / "config.yaml"
    config.write_text(config.read_text().replace(f"steps: {stop}\n", f"steps: {steps}\n", 1))
    (tmp_path / "health.json").write_text("[]\n")
    page = write_report(tmp_path).read_text()
    assert "Not finished" in page and f"stopped at {stop} of {steps}" in page and "Nothing found" not in page


def test_a_run_that_lost_patience_says_where(tmp_path: Path) -> None:
    said: list[str] = []
    config = toy.toy_config(tmp_path, train={"steps": 30}, validation={"every": 2, "prompts": "p.txt", "patience": 2})
    script = {2: 0.5, 4: 0.4, 6: 0.3}
    backbone = toy.ToyBackbone()
    scripted = toy.Scripted(backbone, config.validation, [], {}, {}, 8, 0, script)
    toy.train(config, backbone=backbone, source=toy.ToySource(), say=said.append, validation=scripted)
    assert said[-1] == "health: too short to judge (6 of 20 logged steps); not finished (stopped at 6 of 30)"
    run(tmp_path, said, train={"steps": 30})  # no patience: it is finished
    assert said[-1] == "health: nothing found"


@pytest.mark.parametrize(("silent", "steps"), [(11, 6), (8, 12), (11, 40)])
def test_a_run_in_which_most_groups_weigh_nothing_is_named(tmp_path: Path, silent: int, steps: int) -> None:
    """Also a run that is too short for the other checks."""
    source = toy.ToySource()
    source.rewards[:silent] = 0.5
    said: list[str] = []
    toy.train(
        toy.toy_config(tmp_path, train={"steps": steps}), backbone=toy.ToyBackbone(), source=source, say=said.append
    )
    assert "most groups state no preference" in said[-1] and "labels_without_spread" in found_in(tmp_path)


def test_groups_that_weigh_nothing_are_counted(tmp_path: Path) -> None:
    source = toy.ToySource()
    source.rewards[:3] = 0.5
    said: list[str] = []
    toy.train(toy.toy_config(tmp_path, train={"steps": 26}), backbone=toy.ToyBackbone(), source=source, say=said.append)
    assert said[-1] == "health: nothing found; 23% of the groups drawn state no preference and weighed nothing"


def test_masked_groups_count_as_weightless() -> None:
    """Labels that differ, in groups that are left out for another reason."""
    clear = [LabelledGroup([1.0, 0.0])] * 10
    assert examine_labels(clear) == [] == examine_labels(clear, 5)
    (finding,) = examine_labels(clear, 9)
    assert (finding.name, finding.measured) == ("labels_without_spread", "90% of 10 groups")


@pytest.mark.parametrize(
    ("keys", "share"),
    [
        ({"ema_decay": 0.999, "ema_warmup": False}, "96%"),
        ({"ema_decay": 0.9999, "ema_warmup": False}, "100%"),
        ({"ema_decay": 0.95, "ema_warmup": False}, "13%"),
        ({"ema_decay": 0.9, "ema_warmup": False}, None),
        ({"ema_decay": 0.9999}, None),
        ({"ema_decay": 0.5, "ema_warmup": False, "ema_slope": 0.001}, None),
        ({}, None),
    ],
)
def test_an_average_that_is_its_start_is_named_before_training(
    tmp_path: Path, keys: dict[str, Any], share: str | None
) -> None:
    said: list[str] = []
    run(tmp_path, said, train={"steps": 40, **keys})
    lines = [line for line in said if "dominated by its start" in line and line.startswith("alarm, before training")]
    assert len(lines) == (share is not None)
    assert share is None or f"after 40 steps {share} of it is the weights before the first" in lines[0]
