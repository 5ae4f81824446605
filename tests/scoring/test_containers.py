"""Images in shards: folders of parquet, what `datasets` saves, webdataset's tars, zip files; damaged ones too."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffalign.data import containers
from diffalign.errors import DiffalignError
from diffalign.files.images import Unreadable
from diffalign.scoring.sources import collect
from diffalign.stages.score import ScoreRequest, score
from helpers import pictures

PNG = [pictures.encoded(pictures.smooth(n, 24, 16), "PNG") for n in range(4)]
FACTS = {"tag": "single_object", "include": [{"class": "cat", "count": 1}]}
FILES = {
    "a/0.png": PNG[0],
    "a/0.txt": b"\xef\xbb\xbfa cat",
    "a/1.jpg": PNG[1],
    "a/1.json": json.dumps({"caption": "a dog", **FACTS}).encode(),
    "2.v1.png": PNG[2],
    "2.txt": b"a bird",
    "3.png": PNG[3],
    "3.caption": "größe".encode("latin-1"),
    "__MACOSX/a/._0.png": b"resource fork",
    "notes.md": b"not an image",
}
PROMPTS = {"a/0.png": "a cat", "a/1.jpg": "a dog", "2.v1.png": "a bird", "3.png": None}


def packed(path: Path) -> Path:
    if path.suffix.lower() == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in FILES.items():
                archive.writestr(name, data)
        return path
    with tarfile.open(path, "w") as tar:
        for name, data in FILES.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
        link = tarfile.TarInfo("evil.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    return path


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "X.ZIP"])
def test_archives(tmp_path: Path, name: str) -> None:
    items = collect([str(packed(tmp_path / name))])
    assert {item.key: item.prompt for item in items} == PROMPTS
    by_key = {item.key: item for item in items}
    assert by_key["a/1.jpg"].metadata == FACTS
    assert by_key["3.png"].fault.startswith("3.caption: ")
    assert {key: item.origin.read() for key, item in by_key.items()} == {key: FILES[key] for key in PROMPTS}
    assert score(ScoreRequest([str(tmp_path / name)], ["sharpness"], output=tmp_path / "o.jsonl")) == 0


def test_a_folder_of_archives_and_one_with_loose_images(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    packed(tmp_path / "in" / "0.tar")
    packed(tmp_path / "in" / "1.zip")
    assert sorted(item.key for item in collect([str(tmp_path / "in")])) == sorted(
        f"{n}#{key}" for n in ("0.tar", "1.zip") for key in PROMPTS
    )
    (tmp_path / "in" / "loose.png").write_bytes(PNG[0])
    assert [item.key for item in collect([str(tmp_path / "in")])] == ["loose.png"]


def table(first: int) -> pa.Table:
    return pa.table(
        {"image": [{"bytes": PNG[first + i], "path": None} for i in range(2)], "text": [f"p{first}", f"p{first + 1}"]}
    )


def test_a_folder_of_parquet_shards(tmp_path: Path) -> None:
    (tmp_path / "in" / "data").mkdir(parents=True)
    for n in range(2):
        pq.write_table(table(2 * n), tmp_path / "in" / "data" / f"train-{n}.parquet")
    items = collect([str(tmp_path / "in")])
    assert [(item.key, item.prompt) for item in items] == [
        ("data/train-0.parquet#0", "p0"), ("data/train-0.parquet#1", "p1"),
        ("data/train-1.parquet#0", "p2"), ("data/train-1.parquet#1", "p3"),
    ]  # fmt: skip
    assert [item.origin.read() for item in items] == PNG


@pytest.mark.parametrize("shards", [1, 2])
def test_what_datasets_saves_to_disk(tmp_path: Path, shards: int) -> None:
    features = datasets.Features({"image": datasets.Image(), "prompt": datasets.Value("string")})
    rows = {"image": [{"bytes": data, "path": None} for data in PNG], "prompt": [f"p{n}" for n in range(4)]}
    saved = datasets.Dataset.from_dict(rows, features=features)
    saved.save_to_disk(str(tmp_path / "one"), num_shards=shards)
    datasets.DatasetDict({"train": saved}).save_to_disk(str(tmp_path / "splits"))
    for name in ("one", "splits"):
        items = collect([str(tmp_path / name)])
        assert [item.prompt for item in items] == ["p0", "p1", "p2", "p3"]
        assert [item.origin.read() for item in items] == PNG
        assert score(ScoreRequest([str(tmp_path / name)], ["sharpness"], output=tmp_path / f"{name}.jsonl")) == 0


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.arrow", "x.parquet"])
@pytest.mark.parametrize("data", [b"", b"no archive", b"PK\x03\x04 torn"])
def test_broken_containers_are_one_line(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DiffalignError) as raised:
        collect([str(tmp_path / name)])
    assert name in str(raised.value) and "\n" not in str(raised.value)


def test_a_damaged_member_is_one_row_and_a_huge_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = packed(tmp_path / "x.zip")
    data = path.read_bytes()
    path.write_bytes(data.replace(PNG[0], PNG[0][:-30] + b"\xff" * 30))
    origins = {item.key: item.origin for item in collect([str(path)])}
    with pytest.raises(Unreadable, match=r"x\.zip"):
        origins["a/0.png"].read()
    assert origins["a/1.jpg"].read() == PNG[1]
    assert score(ScoreRequest([str(path)], ["sharpness"], output=tmp_path / "o.jsonl")) == 3
    monkeypatch.setattr(containers, "LARGEST", 10)
    with pytest.raises(Unreadable, match="bytes, more than 10"):
        origins["a/1.jpg"].read()
