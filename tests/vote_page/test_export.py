"""Votes as a table that `pairs` and `score --labels` read, and as records that `judge` reads."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffalign.data.dataset import PreferenceDataset
from diffalign.judge.records import read_pairs, read_ratings
from diffalign.scoring.human_agreement import read_choices
from diffalign.scoring.run import Scores
from diffalign.scoring.sources import collect
from diffalign.voting.log import Undo, Vote, line_of
from helpers.command_line import refused, run
from helpers.vote_data import colour_of, colours, folder_of

VOTE = Vote("v", "2026-01-01T00:00:00+00:00", "anna", "p", ("g00000/0", "g00000/1"), ("base", "tuned"), "left")
VOTES = [
    VOTE,
    replace(VOTE, images=("g00001/1", "g00001/0"), models=("tuned", "base"), answer="right", note="=1+1, \"x\""),
    replace(VOTE, answer="both_bad", rater="ben", scores={"alignment": (4, 2.2), "realism": (None, 3)}),
    replace(VOTE, answer="skip", scores={"alignment": (5, 5)}),
    replace(VOTE, images=("g00001/0", "g00001/2", "g00001/1"), models=("base", "base", "tuned"), answer="ranking",
            ranking=(2, 1, 2), scores={"alignment": (1, 5, None)}),
    replace(VOTE, images=("g00009/0", "g00009/1")),  # an image that is gone
]  # fmt: skip


def log(path: Path, votes: list[Vote]) -> None:
    lines = [line_of(replace(vote, id=f"v{n}")) for n, vote in enumerate(votes)]
    path.write_text("".join(lines) + line_of(replace(VOTE, id="gone")) + line_of(Undo("u", "", "anna", "gone")))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = colours(tmp_path / "data", 2, 3)
    log(folder / "votes.jsonl", VOTES)
    return folder


def table(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def pixel(path: Path) -> list[int]:
    return list(Image.open(path).getpixel((1, 1)))  # type: ignore[arg-type]


def test_a_dataset_as_csv_that_pairs_reads(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "votes" / "mine.csv"
    assert run("vote-export", data, "--out", out) == 0
    rows = table(out)
    assert [(row["choice"], row["answer"]) for row in rows] == [
        ("a", "left"), ("b", "right"), ("tie", "both_bad"), ("b", "ranking"), ("tie", "ranking"), ("a", "ranking"),
    ]  # fmt: skip
    assert [pixel(out.parent / rows[1][f"image_{side}"]) for side in "ab"] == [colour_of(n) for n in VOTES[1].images]
    assert (rows[1]["model1"], rows[1]["model2"], rows[1]["note"]) == ("tuned", "base", '=1+1, "x"')
    assert run("pairs", out, "--out", tmp_path / "pairs") == 0
    pairs = PreferenceDataset(tmp_path / "pairs")
    winners = [max(zip(pairs.column("preference")[i], pairs.images(pairs.column("group_id")[i]), strict=True),
                   key=lambda one: one[0])[1] for i in range(len(pairs))]  # fmt: skip
    found = [list(Image.open(io.BytesIO(row.data)).getpixel((1, 1))) for row in winners]  # type: ignore[arg-type]
    assert found == [colour_of(name) for name in ("g00000/0", "g00001/0", "g00001/2", "g00001/2")]
    assert [row.generator for row in winners] == ["base", "base", "base", "base"]


def test_a_ranking_is_one_row_of_jsonl(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine.jsonl"
    assert run("vote-export", data, "--out", out, "--rater", "anna") == 0
    rows = table(out)
    assert [row["answer"] for row in rows] == ["left", "right", "ranking"]
    assert rows[2]["ranking"] == [2, 1, 2] and len(rows[2]["images"]) == 3
    assert run("pairs", out, "--out", tmp_path / "pairs") == 0
    assert PreferenceDataset(tmp_path / "pairs").column("preference")[2] == [0, 1, 0]
    for name in ((), ("--rater", "human"), ("--rater", "anna", "--rater", "ben")):  # human: all
        assert run("vote-export", data, "--out", out, *name) == 0
        assert [row["answer"] for row in table(out)] == ["left", "right", "both_bad", "ranking"]


@pytest.mark.parametrize("labels", ["log", "folder", "human", "exported.csv", "exported.jsonl"])
def test_labels_of_a_dataset(data: Path, tmp_path: Path, labels: str) -> None:
    path = {"log": data / "votes.jsonl", "folder": data, "human": Path("human")}.get(labels, tmp_path / labels)
    if labels.startswith("exported"):
        assert run("vote-export", data, "--out", path) == 0
    log(data / "votes.jsonl", VOTES[:-1])
    choices = read_choices(path, Scores([], {}, items=collect([str(data)])))
    assert [(c.a, c.b, c.human) for c in choices] == [
        (0, 1, 1),
        (4, 3, -1),
        (0, 1, 0),
        (3, 5, -1),
        (3, 4, 0),
        (5, 4, 1),
    ]


def test_labels_of_one_rater(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log(data / "votes.jsonl", VOTES[:-1])
    assert run("score", data, "-r", "sharpness", "--labels", "ben") == 0
    assert "agreement with 1 human comparisons" in capsys.readouterr().out
    assert "nobody of this name" in refused(capsys, "score", data, "-r", "sharpness", "--labels", "cleo")


def test_two_folders_are_named_beside_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = (folder_of(tmp_path / side, {"1.png": "fox", "sub/2.png": "owl"}) for side in ("base", "tuned"))
    vote = replace(VOTE, prompt="owl", images=("tuned/sub/2.png", "base/sub/2.png"), models=("tuned", "base"))
    log(tmp_path / "votes-base-tuned.jsonl", [vote])
    assert run("vote-export", a, b, "--out", tmp_path / "v.csv") == 0
    assert [table(tmp_path / "v.csv")[0][f"image_{side}"] for side in "ab"] == list(vote.images)  # nothing is copied
    monkeypatch.chdir(a)
    items = collect([".", "../tuned"])
    for labels in ("votes-base-tuned.jsonl", "v.csv"):
        [choice] = read_choices(Path("..") / labels, Scores([], {}, items=items))
        assert [items[choice.a].name, items[choice.b].name, choice.human] == ["../tuned/sub/2.png", "sub/2.png", 1]
    assert run("vote-export", a, b, "--votes", "../votes-base-tuned.jsonl", "--out", tmp_path / "far" / "v.csv") == 0
    copied = [table(tmp_path / "far" / "v.csv")[0][f"image_{side}"] for side in "ab"]
    assert [(tmp_path / "far" / p).read_bytes() for p in copied] == [
        (b / "sub/2.png").read_bytes(),
        (a / "sub/2.png").read_bytes(),
    ]


def test_scores_become_records_of_judges(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "judge"
    assert run("vote-export", data, "--out", out) == 0
    pairs, ratings = read_pairs(out / "pairs.jsonl"), read_ratings(out / "ratings.jsonl")
    assert [(p.dimension, p.scores, pixel(p.images[0])) for p in pairs] == [
        ("alignment", (4.0, 2.0), colour_of("g00000/0")),
        ("alignment", (5.0, 1.0), colour_of("g00001/2")),
    ]
    found = {(r.dimension, *pixel(r.image)): r.ratings for r in ratings}
    assert found == {
        ("alignment", *colour_of("g00000/0")): (4.0, 5.0),  # ben's and anna's
        ("alignment", *colour_of("g00000/1")): (2.0, 5.0),
        ("realism", *colour_of("g00000/1")): (3.0,),
        ("alignment", *colour_of("g00001/0")): (1.0,),
        ("alignment", *colour_of("g00001/2")): (5.0,),
    }


def test_what_cannot_be_written_is_one_line(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (data / "votes.jsonl").read_bytes()
    assert "is the log of votes" in refused(capsys, "vote-export", data, "--out", data / "votes.jsonl")
    assert (data / "votes.jsonl").read_bytes() == before
    assert "ends in .csv or .jsonl" in refused(capsys, "vote-export", data, "--out", tmp_path / "v.parquet")
    assert "no vote of 'cleo'" in refused(capsys, "vote-export", data, "--out", tmp_path / "v.csv", "--rater", "cleo")
    log(data / "votes.jsonl", VOTES[:2])
    assert "scores of a rubric" in refused(capsys, "vote-export", data, "--out", tmp_path / "judge")
    log(data / "votes.jsonl", VOTES[3:4])
    assert "no vote to write" in refused(capsys, "vote-export", data, "--out", tmp_path / "v.csv")
    assert not (tmp_path / "v.csv").exists()
