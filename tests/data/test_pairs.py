"""Your own pairs become a dataset: a csv and two folders give the same, and what is wrong is named."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from PIL import Image

from diffalign.cli import app
from diffalign.data.convert import import_pairs
from diffalign.data.dataset import PreferenceDataset
from diffalign.errors import DiffalignError


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Two pictures with a csv, and the same as two folders."""
    for side, value in (("win", 1), ("lose", 2)):
        (tmp_path / side).mkdir()
        Image.new("RGB", (16, 16), (value, value, value)).save(tmp_path / side / "x.png")
    (tmp_path / "win" / "x.txt").write_text("a red cube\n")
    with (tmp_path / "pairs.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["prompt", "winner", "loser"], ["a red cube", "win/x.png", "lose/x.png"]])
    return tmp_path


def test_csv_and_folders_give_the_same_dataset(own: Path) -> None:
    import_pairs([own / "pairs.csv"], own / "one")
    import_pairs([own / "win", own / "lose"], own / "two")
    for name in ("one", "two"):
        dataset = PreferenceDataset(own / name)
        group = dataset.group(0)
        assert group["prompt"] == "a red cube" and group["preference"] == [1.0, 0.0]
        assert [i.data for i in dataset.images(group["group_id"])] == [
            (own / side / "x.png").read_bytes() for side in ("win", "lose")
        ]


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ("prompt,winner\na,b\n", "column loser is missing"),
        ("prompt,winner,loser\na,win/x.png,\n", "pairs.csv:2: loser is empty"),
        ("prompt,winner,loser\na,win/x.png,../../etc/passwd\n", "leaves its folder"),
        ("prompt,winner,loser\na,win/x.png,win/x.txt\n", r"pairs.csv:2: x\.txt is not a complete image"),
        ("prompt,winner,loser\na,win/x.png,win/none.png\n", r"pairs.csv:2: none\.png: No such file"),
        ("prompt,winner,loser\n", "no row gives a group"),
    ],
)
def test_bad_pairs(own: Path, rows: str, complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    (own / "pairs.csv").write_text(rows)
    with pytest.raises(DiffalignError, match=complaint):
        import_pairs([own / "pairs.csv"], own / "out")
    assert not (own / "out" / "groups.parquet").exists()
    with pytest.raises(SystemExit) as left:
        app(["pairs", str(own / "pairs.csv"), "--out", str(own / "out")])
    error = capsys.readouterr().err
    assert left.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1


def test_truncated_picture_and_missing_caption(own: Path) -> None:
    whole = (own / "lose" / "x.png").read_bytes()
    (own / "lose" / "x.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DiffalignError, match=r"x\.png is not a complete image"):
        import_pairs([own / "win", own / "lose"], own / "out")
    (own / "win" / "x.txt").unlink()
    with pytest.raises(DiffalignError, match=r"no caption; write it into x\.txt"):
        import_pairs([own / "win", own / "lose"], own / "out")
    (own / "lose" / "x.png").unlink()
    with pytest.raises(DiffalignError, match="no image of the same name"):
        import_pairs([own / "win", own / "lose"], own / "out")


def test_the_verb(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for sources, code in (
        (["pairs.csv"], 0),
        (["pairs.csv"], 2),  # the folder holds a dataset now
        (["win"], 2),
        (["win", "lose", "win"], 2),
        (["none.csv"], 2),
    ):
        with pytest.raises(SystemExit) as left:
            app(["pairs", *(str(own / s) for s in sources), "--out", str(own / "out")])
        assert left.value.code == code, sources
    assert "holds a dataset already" in capsys.readouterr().err
    assert json.loads(PreferenceDataset(own / "out")._table["metadata"][0].as_py()) == {}


ROWS = [{"file_name": "x.png", "prompt": "a red cup", "tag": "counting", "include": [{"class": "cup", "count": 1}]}]
TABLE = "file_name,text\n./x.png,a red cup\n"


@pytest.mark.parametrize(
    ("side", "name", "text"),
    [
        ("win", "metadata.jsonl", json.dumps(ROWS[0])),
        ("lose", "metadata.jsonl", json.dumps(ROWS[0])),
        ("lose", "metadata.csv", TABLE),
        ("win", "metadata.csv", TABLE.replace(",", ";")),
    ],
)
def test_two_folders_take_prompts_from_a_metadata_file(own: Path, side: str, name: str, text: str) -> None:
    (own / "win" / "x.txt").unlink()
    (own / side / name).write_text(text)
    import_pairs([own / "win", own / "lose"], own / "out")
    row = PreferenceDataset(own / "out").group(0)
    assert row["prompt"] == "a red cup"
    assert row["metadata"].get("include") == (ROWS[0]["include"] if name.endswith("jsonl") else None)


def test_a_text_beside_an_image_comes_before_the_metadata_file(own: Path) -> None:
    before = (own / "win" / "x.txt").read_text().strip()
    (own / "win" / "metadata.jsonl").write_text(json.dumps(ROWS[0]))
    import_pairs([own / "win", own / "lose"], own / "out")
    assert PreferenceDataset(own / "out").group(0)["prompt"] == before != "a red cup"


def test_a_broken_metadata_file_is_named(own: Path) -> None:
    (own / "win" / "metadata.jsonl").write_text('{"prompt": "no image"}\n{"prompt": "again"}')
    with pytest.raises(DiffalignError, match=r"metadata.jsonl:1: no file_name"):
        import_pairs([own / "win", own / "lose"], own / "out")
