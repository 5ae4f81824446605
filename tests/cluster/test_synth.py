"""`diffalign synth` with `engine=ray`: drawing and scoring on nodes that die, and the bytes of a run on one machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diffalign.config import load_synth_config
from diffalign.stages.synth import synth
from helpers.files import tree
from helpers.ray_cluster import NODE, when
from helpers.slow_reward import noted

pytest.importorskip("ray", reason="Ray is not installed (make test-ray)")

CONFIG = """
device: cpu
threads: 1
prompts: {source: PROMPTS}
generators:
- {name: one, model: {path: shapes-sd3}, images_per_prompt: 2, batch_size: 3, steps: 2, height: 32, width: 32}
rewards: [{name: "helpers.slow_reward:Slow", options: OPTIONS}, sharpness]
reward_batch: 4
contact_sheet: 3
"""
PROMPTS = 21


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("diffalign.data.plan.IMAGES_PER_SHARD", 16)
    (tmp_path / "prompts.txt").write_text("".join(f"prompt {i}\n" for i in range(PROMPTS)))

    def made(name: str, *overrides: str, options: str = "{}") -> dict[str, Any]:
        text = CONFIG.replace("PROMPTS", str(tmp_path / "prompts.txt")).replace("OPTIONS", options)
        (tmp_path / "config.yaml").write_text(text)
        out = tmp_path / name / "data"
        synth(load_synth_config(tmp_path / "config.yaml", [f"out={out}", *overrides]))
        assert not (out / ".work").exists()
        return tree(out)

    return made


def test_nodes_are_killed_while_drawing_and_while_scoring(tmp_path: Path, cluster: Any, make: Any) -> None:
    expected = make("one")
    cluster.log.unlink()
    pieces = tmp_path / "ray" / "data" / ".work" / "images"
    first, second = cluster.add_node(**NODE), []
    drawing = when(
        lambda: len(list(pieces.rglob("*.parquet"))) >= 2,
        lambda: (cluster.remove_node(first, allow_graceful=False), second.append(cluster.add_node(**NODE))),
    )
    nodes = lambda: {node for node, _ in noted()}  # noqa: E731
    scoring = when(
        lambda: bool(second) and second[0].node_id in nodes(),
        lambda: cluster.remove_node(second[0], allow_graceful=False),
    )
    assert make("ray", "engine=ray", "actors=2", options="{pause: 0.2, nodes: 2}") == expected
    drawing.join()
    scoring.join()
    batches = [prompts for _, prompts in noted()]
    assert second[0].node_id in nodes() and len(set(batches)) <= len(batches) <= len(set(batches)) + 2
