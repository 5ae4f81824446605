"""Where `score` finds the prompt of an image: metadata, tables and files beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffalign.errors import DiffalignError
from diffalign.files.paths import FOLLOW_LINKS
from diffalign.scoring.captions import PromptTable
from diffalign.scoring.sources import collect
from diffalign.stages.score import ScoreRequest, score
from helpers import pictures
from helpers.scored_items import prompts_of


def below(tmp_path: Path) -> Path:
    """The imagefolder of the `datasets` library: metadata at the root, images in folders below."""
    for place in ("images", "images/deep"):
        (tmp_path / "set" / place).mkdir(parents=True)
    for n, name in enumerate(("images/0.png", "images/1.png", "images/deep/2.png")):
        pictures.smooth(n).save(tmp_path / "set" / name)
    return tmp_path / "set"


NAMES = ("images/0.png", "./images/1.png", "images/deep/../deep/2.png")


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("column", ["file_name", "filename", "image_path", "image"])
def test_metadata_at_the_root_and_images_below(tmp_path: Path, ending: str, column: str) -> None:
    folder = below(tmp_path)
    rows = [{column: name, "caption": f"prompt {n}"} for n, name in enumerate(NAMES)]
    path = folder / f"metadata.{ending}"
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        lines = [json.dumps(row) for row in rows]
        path.write_text(
            "\n".join(lines if ending == "jsonl" else [f"{column},caption", *(",".join(r.values()) for r in rows)])
        )
    found = prompts_of([str(folder)])
    assert found == {"images/0.png": "prompt 0", "images/1.png": "prompt 1", "images/deep/2.png": "prompt 2"}


def test_the_nearest_metadata_counts_and_missing_images_get_a_row(tmp_path: Path) -> None:
    folder = below(tmp_path)
    rows = [{"file_name": name, "text": "from the root"} for name in (*NAMES, "images/none.png")]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "images" / "metadata.csv").write_text("file_name;text\n0.png;near\n")
    items = collect([str(folder)])
    assert [(item.key, item.prompt) for item in items] == [
        ("images/0.png", "near"), ("images/1.png", "from the root"), ("images/none.png", "from the root"),
        ("images/deep/2.png", "from the root"),
    ]  # fmt: skip
    assert score(ScoreRequest([str(folder)], ["sharpness"], output=tmp_path / "o.jsonl")) == 3


def test_linked_images_with_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLLOW_LINKS, "1")
    folder = below(tmp_path)
    links = tmp_path / "links"
    links.mkdir()
    (links / "0.png").symlink_to(folder / "images" / "0.png")
    (links / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "x"}\n')
    assert prompts_of([str(links)]) == {"0.png": "x"}


def test_a_stray_row_does_not_rule_the_folder(tmp_path: Path) -> None:
    folder = below(tmp_path)
    (folder / "metadata.jsonl").write_text('{"title": "my set", "prompt": "no prompt of an image"}')
    with pytest.raises(DiffalignError, match=r"metadata.jsonl:1: no file_name"):
        collect([str(folder)])


@pytest.mark.parametrize("column", ["file_name", "image", "image_path", "path"])
def test_one_row_that_names_an_image_is_of_that_image(tmp_path: Path, column: str) -> None:
    """Also with GenEval's facts in it, which in a file without names belong to the whole folder."""
    folder = below(tmp_path)
    row = {column: "images/1.png", "prompt": "a cat", "include": [{"class": "cat", "count": 1}]}
    (folder / "metadata.jsonl").write_text(json.dumps(row))
    assert prompts_of([str(folder)]) == {"images/0.png": None, "images/1.png": "a cat", "images/deep/2.png": None}


@pytest.mark.parametrize("again", ["images/0.png", "./images/0.png", "images/deep/../0.png"])
def test_metadata_with_two_prompts_of_an_image_is_refused(tmp_path: Path, again: str) -> None:
    folder = below(tmp_path)
    rows = [{"file_name": "images/0.png", "text": "a"}, {"file_name": again, "text": "a"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert prompts_of([str(folder)])["images/0.png"] == "a"
    rows[1]["text"] = "b"
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DiffalignError, match=r"metadata\.jsonl:2: '.*0\.png' has another prompt above"):
        collect([str(folder)])


@pytest.mark.parametrize("column", ["file_name", "filename", "image_path", "path", "id"])
def test_prompt_tables_are_relative_to_themselves(tmp_path: Path, column: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = below(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    names = (*NAMES[:2], str(folder / "images" / "deep" / "2.png"))
    (folder / "t.csv").write_text(f"{column},prompt\n" + "".join(f"{name},p{n}\n" for n, name in enumerate(names)))
    found = prompts_of([str(folder / "images")], table=PromptTable(folder / "t.csv", None))
    assert found == {"0.png": "p0", "1.png": "p1", "deep/2.png": "p2"}


def test_tables_that_say_nothing_or_two_things(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = below(tmp_path)
    table = tmp_path / "t.csv"
    table.write_text("file,prompt\n0.png,a\n9.png,b\n8.png,c\n")
    request = ScoreRequest([str(folder)], ["sharpness"], prompts=table)
    assert score(request) == 0
    assert "2 rows name no image that is scored, such as '9.png'" in capsys.readouterr().err
    table.write_text("file,prompt\nx.png,a\n9.png,b\n")
    with pytest.raises(DiffalignError, match="none of its 2 rows names an image that is scored"):
        score(request)
    table.write_text("file,prompt\n0.png,a\n0.png,b\n")
    with pytest.raises(DiffalignError, match=r"t\.csv:3: '0\.png' has another prompt above"):
        score(request)
    for again in ("./0.png", "x/../0.png", str(tmp_path / "0.png")):
        table.write_text(f"file,prompt\n0.png,a\n{again},b\n")
        with pytest.raises(DiffalignError, match=r"t\.csv:3: '.*0\.png' has another prompt above"):
            score(request)
    rows = [{"file": "0.png", "prompt": "a", "include": [{"class": c, "count": 1}]} for c in ("cat", "dog")]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DiffalignError, match=r"t\.jsonl:2: '0\.png' has another prompt above"):
        score(ScoreRequest([str(folder)], ["sharpness"], prompts=tmp_path / "t.jsonl"))
    table.write_text("file,words\n0.png,a\n")
    with pytest.raises(DiffalignError, match="column prompt is missing .*; there are file, words"):
        score(request)


def test_skipped_files_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = below(tmp_path)
    for name in ("a.tga", "b.TGA", "c.mp4", "noend", "0.txt"):
        (folder / name).write_bytes(b"x")
    for name in ("d.jfif", "e.jpe"):
        pictures.smooth(1).save(folder / name, "JPEG")
    (folder / "link").symlink_to(folder / "images", target_is_directory=True)
    assert score(ScoreRequest([str(folder)], ["sharpness"], output=tmp_path / "o.jsonl")) == 0
    assert "skipped: 2 .tga, 1 .mp4, 1 linked folders, 1 without a suffix" in capsys.readouterr().err
    assert len((tmp_path / "o.jsonl").read_text().splitlines()) == 5


def test_an_unreadable_file_beside_an_image_is_the_reason(tmp_path: Path) -> None:
    folder = below(tmp_path)
    (folder / "images" / "0.txt").write_bytes("größe".encode("latin-1"))
    (item, *_) = collect([str(folder)])
    assert item.prompt is None and item.fault == "0.txt: not UTF-8 at byte 2; save it as UTF-8"


def test_images_without_any_prompt_are_refused_before_weights_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = below(tmp_path)
    monkeypatch.setattr("diffalign.stages.score.score_items", lambda *a, **k: pytest.fail("scored"))
    for rewards in (["pickscore"], ["ocr"], ["hpsv2", "imagereward"], ["geneval:detector=shapes"]):
        with pytest.raises(DiffalignError, match="no image has a prompt; give --prompt"):
            score(ScoreRequest([str(folder)], rewards))
