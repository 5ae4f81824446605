"""`diffalign score` from and to addresses: the rows of the same files in a folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import diffalign
from diffalign.cli import app
from diffalign.errors import DiffalignError
from diffalign.scoring import mirror
from diffalign.stages.score import ScoreRequest, place_of_output, score
from helpers import pictures

PLACE = "memory://bucket/in"


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[Any]:
    """tmp_path/in, at an address too."""
    pictures.folder(tmp_path / "in", 9, ["a cat", "a dog"])
    (tmp_path / "in" / "more").mkdir()
    pictures.smooth(3).save(tmp_path / "in" / "more" / "x.png")
    (tmp_path / "in" / "more" / "x.txt").write_text("beside")
    (tmp_path / "in" / "broken.png").write_bytes(b"no picture")
    fs = fsspec.filesystem("memory")
    fs.put(str(tmp_path / "in"), "/bucket/in", recursive=True)
    yield fs
    fs.rm("/bucket", recursive=True)


def rows(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in data.splitlines()]


def named(found: list[dict[str, Any]], source: str) -> dict[str, dict[str, Any]]:
    return {row["image"].removeprefix(source): {k: v for k, v in row.items() if k != "image"} for row in found}


def test_the_rows_of_a_folder(tmp_path: Path, bucket: Any) -> None:
    out = tmp_path / "o.jsonl"
    assert score(ScoreRequest([str(tmp_path / "in")], ["sharpness"], output=out)) == 3
    assert score(ScoreRequest([PLACE], ["sharpness"], output="memory://bucket/o.jsonl")) == 3
    here, there = rows(out.read_bytes()), rows(bucket.cat("/bucket/o.jsonl"))
    assert named(there, PLACE) == named(here, str(tmp_path / "in")) and len(here) == 11
    assert {row["prompt"] for row in there} == {"a cat", "a dog", "beside", None}
    assert bucket.ls("/bucket", detail=False) == ["/bucket/in", "/bucket/o.jsonl"]


def test_containers_are_copied(tmp_path: Path, bucket: Any, capsys: pytest.CaptureFixture[str]) -> None:
    images = [{"image": (tmp_path / "in" / f"00{i}.png").read_bytes(), "prompt": f"p{i}"} for i in range(4)]
    pq.write_table(pa.Table.from_pylist(images), tmp_path / "shard.parquet")
    bucket.put(str(tmp_path / "shard.parquet"), "/bucket/shards/shard.parquet")
    assert score(ScoreRequest(["memory://bucket/shards"], ["sharpness"], output="memory://bucket/o.jsonl")) == 0
    found = rows(bucket.cat("/bucket/o.jsonl"))
    assert [(row["image"], row["prompt"]) for row in found] == [
        (f"memory://bucket/shards/shard.parquet#{i}", f"p{i}") for i in range(4)
    ]
    assert "skipped" not in capsys.readouterr().err


def test_a_killed_run_goes_on_from_what_was_sent(
    tmp_path: Path, bucket: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    request = ScoreRequest([PLACE], ["sharpness"], output="memory://bucket/o.csv", batch_size=2)
    score(request)
    straight = bucket.cat("/bucket/o.csv")
    bucket.rm("/bucket/o.csv")
    monkeypatch.setattr(mirror, "EVERY", 0.0)
    genuine, left = mirror.Mirror.sync, iter(range(2))

    def sync(self: mirror.Mirror, now: bool = False) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt  # as a kill: nothing is sent any more
        genuine(self, now)

    monkeypatch.setattr(mirror.Mirror, "sync", sync)
    with pytest.raises(KeyboardInterrupt):
        score(request)
    assert len(bucket.ls("/bucket/o.csv.journal")) == 2 and not bucket.exists("/bucket/o.csv")
    monkeypatch.setattr(mirror.Mirror, "sync", genuine)
    capsys.readouterr()
    score(request)
    assert "(6 scores new, 4 known)" in capsys.readouterr().out
    assert bucket.cat("/bucket/o.csv") == straight and not bucket.exists("/bucket/o.csv.journal")


@pytest.mark.parametrize("python", [True, False])
def test_an_output_that_cannot_be_written_costs_no_work(
    bucket: Any, monkeypatch: pytest.MonkeyPatch, python: bool
) -> None:
    def refused(self: Any, path: str, value: Any = None, **_: Any) -> None:
        raise PermissionError("403: this key may only read")

    monkeypatch.setattr(type(bucket), "pipe_file", refused)
    worked: list[int] = []
    monkeypatch.setattr("diffalign.scoring.run.make_plan", lambda *_, **__: worked.append(1))
    with pytest.raises(DiffalignError, match="^memory://bucket/o.jsonl: .*403: this key may only read"):
        if python:
            diffalign.score(PLACE, rewards="sharpness", output="memory://bucket/o.jsonl")
        else:
            score(ScoreRequest([PLACE], ["sharpness"], output="memory://bucket/o.jsonl"))
    assert not worked


def test_the_command_line_keeps_both_slashes(tmp_path: Path, bucket: Any, capsys: pytest.CaptureFixture[str]) -> None:
    bucket.pipe("/bucket/p.jsonl", b'{"file_name": "000.png", "prompt": "from the table"}\n')
    with pytest.raises(SystemExit):
        app(
            ["score", f"{PLACE}/000.png", "-r", "sharpness", "--prompts", "memory://bucket/p.jsonl",
             "-o", "memory://bucket/o.jsonl"],
            prog_name="diffalign",
        )  # fmt: skip
    (row,) = rows(bucket.cat("/bucket/o.jsonl"))
    assert (row["image"], row["prompt"]) == (f"{PLACE}/000.png", "from the table")
    assert "output: memory://bucket/o.jsonl (1 score new" in capsys.readouterr().out


def test_what_addresses_cannot_be(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.pipe("/bucket/data/groups.parquet", b"")
    with pytest.raises(DiffalignError, match="a dataset folder; copy it to a disk"):
        score(ScoreRequest(["memory://bucket/data"], ["sharpness"]))
    with pytest.raises(DiffalignError, match="memory://bucket/none: no"):
        score(ScoreRequest(["memory://bucket/none"], ["sharpness"]))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(DiffalignError, match="several processes write to a disk"),
        place_of_output("memory://bucket/o.jsonl"),
    ):
        pass
