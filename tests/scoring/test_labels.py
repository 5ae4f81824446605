"""`score --labels` reads what `pairs` reads: the same forms, names of columns and paths."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffalign.data.dataset import PreferenceDataset
from diffalign.data.imported import write_imported
from diffalign.data.read_tables import read_table
from diffalign.errors import DiffalignError
from diffalign.scoring.human_agreement import read_choices
from diffalign.scoring.run import Scores
from diffalign.scoring.sources import collect
from helpers import pictures

Writer = Callable[[Path], None]


def csv(text: str, name: str = "c.csv", encoding: str = "utf-8") -> tuple[str, Writer]:
    return name, lambda path: path.write_text(text, encoding=encoding) and None


def parquet(*rows: dict[str, Any]) -> tuple[str, Writer]:
    return "c.parquet", lambda path: pq.write_table(pa.Table.from_pylist(list(rows)), path)


def jsonl(*rows: dict[str, Any]) -> tuple[str, Writer]:
    return "c.jsonl", lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in rows)) and None


def gz(text: str) -> tuple[str, Writer]:
    return "c.csv.gz", lambda path: path.write_bytes(gzip.compress(text.encode()))


FORMS = [
    csv("prompt,winner,loser\np,in/001.png,in/000.png\n"),
    csv("Prompt;Winner ;LOSER\np;in/001.png;in/000.png\n"),
    csv("prompt,winner,loser\np,in/001.png,in/000.png\n", encoding="utf-8-sig"),
    csv("prompt\tchosen\trejected\np\tin/001.png\tin/000.png\n", "c.tsv"),
    gz("prompt,preferred,lose\np,in/001.png,in/000.png\n"),
    csv("text,image_a,image_b,choice\np,in/000.png,in/001.png, B \n"),
    csv("caption,image_a,image_b,preference\np,in/001.png,./in/000.png,a\n"),
    csv("prompt,image_0,image_1,label\np,in/000.png,in/001.png,1\n"),
    csv("prompt,Image_0,image_1,label\np,in/001.png,in/000.png,0.0\n"),
    csv("prompt,image1,image2,label\np,in/000.png,in/001.png,2\n"),
    csv("prompt,image1,image2,votes_image1,votes_image2\np,in/001.png,in/../in/000.png,5,2\n"),
    jsonl({"prompt": "p", "image1": "in/000.png", "image2": "in/001.png", "weighted_results_image1": 0.2,
           "weighted_results_image2": 0.8}),
    jsonl({"prompt": "p", "images": ["in/000.png", "in/001.png"], "ranking": [2, 1]}),
    jsonl({"prompt": "p", "generations": ["in/000.png", "in/001.png"], "preference": [0, 1]}),
    parquet({"prompt": "p", "chosen": "in/001.png", "rejected": "in/000.png"}),
    parquet({"prompt": "p", "chosen": {"bytes": None, "path": "in/001.png"},
             "rejected": {"bytes": None, "path": "in/000.png"}}),
    ("c.json", lambda path: path.write_text('[{"prompt": "p", "win": "in/001.png", "lose": "in/000.png"}]') and None),
]  # fmt: skip


@pytest.fixture
def scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scores:
    pictures.folder(tmp_path / "set" / "in", 3)
    # An image of the same name lies where the command runs; `pairs` takes the one beside the table.
    pictures.folder(tmp_path / "in", 3)
    monkeypatch.chdir(tmp_path)
    return Scores([], {}, items=collect(["in", "set/in"]))


@pytest.mark.parametrize("form", FORMS, ids=range(len(FORMS)))
def test_labels_read_what_pairs_reads(tmp_path: Path, scores: Scores, form: tuple[str, Writer]) -> None:
    name, write = form
    table = Path("set") / name
    write(table)
    (choice,) = read_choices(table, scores)
    preferred, other = (choice.a, choice.b) if choice.human == 1 else (choice.b, choice.a)
    assert choice.human and [scores.items[i].name for i in (preferred, other)] == ["set/in/001.png", "set/in/000.png"]
    # `pairs` makes of the same file a group whose better image has the same bytes.
    report = write_imported(read_table(table), tmp_path / "out")
    dataset = PreferenceDataset(tmp_path / "out")
    better = int(dataset.group(0)["preference"][1] > dataset.group(0)["preference"][0])
    assert report.groups == 1
    assert dataset.image_at(better).data == scores.items[preferred].origin.read()


@pytest.mark.parametrize(
    ("text", "human"),
    [
        ("image_a,image_b,choice\nin/000.png,in/001.png,tie\n", [0]),
        ("image_0,image_1,label\nin/000.png,in/001.png,0.5\n", [0]),
        ("image1,image2,votes_image1,votes_image2\nin/000.png,in/001.png,2,2\n", [0]),
        ("image,rating\nin/000.png,3\nin/001.png,3\nin/002.png,1\n", [0, 1, 1]),
        ("filename;Score;group\nin/000.png;1,5;x\nin/001.png;2;x\nin/002.png;9;y\n", [-1]),
    ],
)
def test_ties_and_ratings_count(scores: Scores, text: str, human: list[int]) -> None:
    Path("set/c.csv").write_text(text)
    assert [c.human for c in read_choices(Path("set/c.csv"), scores)] == human


def test_a_ranking_is_a_choice_between_every_two(scores: Scores) -> None:
    jsonl({"images": ["in/000.png", "in/001.png", "in/002.png"], "ranking": [1, 2, 2]})[1](Path("set/c.jsonl"))
    assert [(c.a, c.b, c.human) for c in read_choices(Path("set/c.jsonl"), scores)] == [(3, 4, 1), (3, 5, 1), (4, 5, 0)]


@pytest.mark.parametrize(("column", "labels"), [("preference", [1, None, 0]), ("ranking", [1, float("nan"), 2])])
def test_an_image_without_a_label_ties_with_no_other(scores: Scores, column: str, labels: list[float | None]) -> None:
    jsonl({"images": ["in/000.png", "in/001.png", "in/002.png"], column: labels})[1](Path("set/c.jsonl"))
    assert [(c.a, c.b, c.human) for c in read_choices(Path("set/c.jsonl"), scores)] == [(3, 5, 1)]


@pytest.mark.parametrize(
    ("form", "words"),
    [
        (csv("image_0,image_1,label\nin/000.png,in/001.png,2\n"), "c.csv:2: label '2'; one of 0, 1, 0.5, a, b, tie"),
        (csv("winner,loser\nin/000.png,in/000.png\n"), "c.csv:2: the same image stands in it twice"),
        (csv("winner,loser\nin/000.png,002\n"), "c.csv:2: '002' names more than one image; give its path"),
        (csv("winner,loser\nin/000.png,\n"), "c.csv:2: '' is none of the scored images"),
        (csv("winner,loser\n/etc/passwd,in/000.png\n"), "c.csv:2: '/etc/passwd' is none of the scored images"),
        (parquet({"chosen": b"x", "rejected": b"y"}), "row 0: a cell with image bytes is none of the scored images"),
        (csv("filename,size\nin/000.png,3\n"), "there are filename, size"),
        (jsonl({"images": ["in/000.png", "in/001.png"], "ranking": [1]}), "ranking must have a number for each"),
        (csv("image_a,image_b,choice\nin/000.png,in/001.png,\n"), "c.csv: none of its 1 rows compares two images"),
        (csv("image,rating\nin/000.png,3\n"), "c.csv: none of its 1 rows compares two images"),
    ],
    ids=range(10),
)
def test_what_cannot_be_read_is_named(scores: Scores, form: tuple[str, Writer], words: str) -> None:
    name, write = form
    write(Path("set") / name)
    with pytest.raises(DiffalignError, match=words):
        read_choices(Path("set") / name, scores)
