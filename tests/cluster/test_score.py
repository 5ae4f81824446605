"""`diffalign score --engine ray` on nodes that die and join: the bytes of a run on one machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from diffalign.errors import DiffalignError
from diffalign.stages.score import ScoreRequest, score
from helpers import pictures
from helpers.ray_cluster import NODE, when
from helpers.slow_reward import noted

pytest.importorskip("ray", reason="Ray is not installed (make test-ray)")

import ray

IMAGES = 30


def run(folder: Path, name: str, reward: str, **more: Any) -> bytes:
    out = folder / name
    request = ScoreRequest([str(folder / "in")], [reward], output=out, batch_size=2, device="cpu", **more)
    assert score(request) == 0
    assert not out.with_name(out.name + ".journal").exists()
    return out.read_bytes()


def make_pictures(folder: Path) -> None:
    pictures.folder(folder / "in", IMAGES, [f"p{i:02d}" for i in range(IMAGES)])


def test_a_node_joins_and_one_is_killed(tmp_path: Path, cluster: Any) -> None:
    make_pictures(tmp_path)
    reward = "helpers.slow_reward:Slow"
    expected = run(tmp_path, "one.jsonl", reward)
    cluster.log.unlink()
    late: list[Any] = []
    joins = when(lambda: len(noted()) >= 1, lambda: late.append(cluster.add_node(**NODE)))
    nodes = lambda: {node for node, _ in noted()}  # noqa: E731
    kills = when(lambda: len(nodes()) == 2, lambda: cluster.remove_node(late[0], allow_graceful=False))
    found = run(tmp_path, "ray.jsonl", f"{reward}:pause=0.3,nodes=2", engine="ray", actors=2)
    joins.join()
    kills.join()
    done = noted()
    # Both nodes worked. Every batch was scored; only what was in flight on the dead node was scored again.
    assert len(nodes()) == 2 and late[0].node_id in nodes()
    assert len({prompts for _, prompts in done}) == IMAGES // 2 <= len(done) <= IMAGES // 2 + 2
    assert found == expected
    rows = [json.loads(line) for line in found.splitlines()]
    assert len({row["image"] for row in rows}) == len(rows) == IMAGES


def test_the_clients_address(tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    make_pictures(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS")
    found = run(tmp_path, "ray.jsonl", "helpers.slow_reward:Slow", engine=cluster.client)
    assert not ray.is_initialized() and {node for node, _ in noted()} != {"here"}
    assert found == run(tmp_path, "one.jsonl", "helpers.slow_reward:Slow")


def test_a_batch_that_ends_its_process(tmp_path: Path, cluster: Any) -> None:
    make_pictures(tmp_path)
    reward = "helpers.slow_reward:Slow"
    with pytest.raises(DiffalignError, match="a batch ended its process 5 times"):
        run(tmp_path, "ray.jsonl", f"{reward}:dies_on=p29", engine="ray")
    kept = [json.loads(line)["key"] for line in (tmp_path / "ray.jsonl.journal" / "0.jsonl").read_text().splitlines()]
    assert len(kept) == len(set(kept)) == IMAGES - 2
    assert run(tmp_path, "ray.jsonl", reward, engine="ray") == run(tmp_path, "one.jsonl", reward)


def test_a_prompt_that_fails_costs_one_row_unless_all_fail(tmp_path: Path, cluster: Any) -> None:
    make_pictures(tmp_path)

    def rows(name: str, fails_on: str, **more: Any) -> list[dict[str, Any]]:
        reward = f"helpers.slow_reward:Slow:fails_on={fails_on}"
        out = tmp_path / name
        assert (
            score(ScoreRequest([str(tmp_path / "in")], [reward], output=out, batch_size=4, device="cpu", **more)) == 3
        )
        return [json.loads(line) for line in out.read_text().splitlines()]

    with pytest.raises(ValueError, match="this prompt cannot be scored"):
        rows("all.jsonl", "p", engine="ray")
    # The last batch but one fails as a whole. It is no actor's first batch that decides, but whether another one succeeded.
    found = rows("ray.jsonl", "p2", engine="ray")
    assert found == rows("one.jsonl", "p2")
    failed = [row["prompt"] for row in found if row["slow.reason"] == "ValueError: this prompt cannot be scored"]
    assert failed == [f"p{i}" for i in range(20, 30)]


def test_a_cluster_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_pictures(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(DiffalignError, match="--engine ray: no cluster answers"):
        run(tmp_path, "ray.jsonl", "sharpness", engine="ray")
