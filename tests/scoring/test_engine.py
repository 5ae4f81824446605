"""`--engine ray` on a stand-in for Ray: batches whose actors die and whose answers come in any order."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from diffalign.cluster import MOST_LOST
from diffalign.config.load import load
from diffalign.errors import DiffalignError
from diffalign.scoring.processes import Processes
from diffalign.stages.score import ScoreRequest, score
from helpers import pictures
from helpers.fake_ray import FakeRay

IMAGES = 22
SLOW = "helpers.slow_reward:Slow"


def run(folder: Path, name: str, reward: str = SLOW, source: str | None = None, **more: Any) -> bytes:
    out = folder / name
    request = ScoreRequest([source or str(folder / "in")], [reward], output=out, batch_size=4, device="cpu", **more)
    score(request)
    assert not out.with_name(out.name + ".journal").exists()
    return out.read_bytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pictures.folder(tmp_path / "in", IMAGES, [f"p{i:02d}" for i in range(IMAGES)])
    (tmp_path / "in" / "broken.png").write_bytes(b"no picture")
    (tmp_path / "in" / "001.png").write_bytes((tmp_path / "in" / "001.png").read_bytes()[:-40])
    return tmp_path


@pytest.mark.parametrize("dies", [(), (2,), (1, 2, 3, 5)])
def test_the_bytes_of_one_machine(folder: Path, monkeypatch: pytest.MonkeyPatch, dies: tuple[int, ...]) -> None:
    fake = FakeRay(dies=dies)
    monkeypatch.setitem(sys.modules, "ray", fake)
    assert run(folder, "ray.jsonl", engine="ray") == run(folder, "one.jsonl")
    assert not fake.up and (fake.made > 3) == bool(dies) and fake.calls >= 6
    rows = [json.loads(line) for line in (folder / "ray.jsonl").read_text().splitlines()]
    assert [row["image"] for row in rows if row["slow"] is None] == [
        str(folder / "in" / n) for n in ("001.png", "broken.png")
    ]


def test_actors_without_a_cluster_are_refused(folder: Path) -> None:
    with pytest.raises(DiffalignError, match="--actors 3: only a cluster has actors; add --engine ray"):
        run(folder, "one.jsonl", actors=3)
    with pytest.raises(DiffalignError, match="actors: .*only a cluster has actors; set engine=ray|actors=3: only a"):
        load("synth", "synth_one_gpu", ["actors=3"])


def test_images_at_an_address_are_read_by_the_actors(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", FakeRay())
    address = f"file://{folder}/in"
    assert run(folder, "ray.jsonl", source=address, engine="ray") == run(folder, "one.jsonl", source=address)


def test_a_batch_that_always_ends_its_actor(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", FakeRay(nodes=1, dies=tuple(range(3, 100))))
    with pytest.raises(DiffalignError, match=f"a batch ended its process {MOST_LOST} times"):
        run(folder, "ray.jsonl", engine="ray")
    kept = (folder / "ray.jsonl.journal" / "0.jsonl").read_text().splitlines()
    assert 4 <= len(kept) <= 8
    monkeypatch.setitem(sys.modules, "ray", FakeRay())
    assert run(folder, "ray.jsonl", engine="ray") == run(folder, "one.jsonl")


def test_a_prompt_that_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that fails as a whole before any other has succeeded is tried again: it may be its images' fault."""
    monkeypatch.setitem(sys.modules, "ray", FakeRay())
    reward = f"{SLOW}:fails_on=p1"  # ten of 21, two whole batches
    assert run(folder, "ray.jsonl", reward, engine="ray") == run(folder, "one.jsonl", reward)
    with pytest.raises(ValueError, match="this prompt cannot be scored"):
        run(folder, "all.jsonl", f"{SLOW}:fails_on=p", engine="ray")


def test_a_node_with_another_model_or_version_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", FakeRay())
    genuine = "diffalign.scoring.on_cluster.check_same"
    from diffalign.scoring import on_cluster

    check = on_cluster.check_same
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(genuine, lambda what, driver, here: check(what, driver, {**here, "weights": "other"}))
        with pytest.raises(DiffalignError, match=r"reward slow: weights='other' on node .*give every node the same"):
            run(folder, "ray.jsonl", engine="ray")
    from diffalign import cluster

    genuine_ready = cluster.Actor.ready

    def ready(self: Any) -> Any:
        self.version = "0"
        return genuine_ready(self)

    monkeypatch.setattr(cluster.Actor, "ready", ready)
    with pytest.raises(DiffalignError, match="install one version everywhere"):
        run(folder, "ray.jsonl", engine="ray")


@pytest.mark.parametrize(
    ("engine", "more", "reason"),
    [
        ("spark", {}, "--engine spark: unknown; use local, ray or ray://HOST:PORT"),
        ("ray", {"WORLD_SIZE": "2"}, "start one process; Ray starts the others"),
        ("ray://127.0.0.1:1", {}, "no cluster answers"),
        ("ray", {"RAY_ADDRESS": "127.0.0.1:1"}, "no cluster answers"),
    ],
)
def test_what_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, engine: str, more: dict[str, str], reason: str
) -> None:
    monkeypatch.setitem(sys.modules, "ray", FakeRay())
    monkeypatch.setattr("diffalign.stages.score.Processes.start", lambda: Processes())
    for name, value in more.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DiffalignError, match=reason):
        run(folder, "ray.jsonl", engine=engine)


def test_ray_is_named_where_it_is_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DiffalignError, match=r"--engine ray: ray is not installed; pip install 'diffalign\[ray\]'"):
        run(folder, "ray.jsonl", engine="ray")
