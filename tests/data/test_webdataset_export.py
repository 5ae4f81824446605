"""The webdataset export opens in `datasets`, as a folder and as files, whatever the groups hold."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import datasets
import pytest

from diffalign.data.dataset import PreferenceDataset
from diffalign.data.dataset_export import export
from diffalign.data.imported import ImportedGroup, write_imported
from helpers import pictures

PNG = [pictures.encoded(pictures.smooth(n, 24, 16), "PNG") for n in range(4)]
JPEG = [pictures.encoded(pictures.smooth(n, 24, 16), "JPEG") for n in range(4)]
POSITION = {
    "tag": "position",
    "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}],
}
METADATA: list[dict[str, Any]] = [POSITION, {"axis": 3}, {"axis": "text"}, {}]


def group(n: int, count: int = 2, labels: int | None = None, images: list[bytes] = PNG) -> ImportedGroup:
    preference = (1.0, 0.0, 0.5, 0.25)[: count if labels is None else labels]
    return ImportedGroup(f"prompt {n}", tuple(images[:count]), preference, "x", metadata=METADATA[n % len(METADATA)])


CASES = {
    "position prompts and metadata of several types": [group(n) for n in range(8)],
    "groups of two to four": [group(n, 2 + n % 3) for n in range(20)],
    "no preference in the first groups": [group(n, 2, 0 if n < 7 else 2) for n in range(13)],
    "one group": [group(0, 3)],
}


@pytest.mark.parametrize("groups", CASES.values(), ids=CASES)
@pytest.mark.parametrize("how", ["folder", "webdataset"])
def test_datasets_opens_it(tmp_path: Path, groups: list[ImportedGroup], how: str) -> None:
    write_imported(groups, tmp_path / "data")
    export(PreferenceDataset(tmp_path / "data"), tmp_path / "export", "webdataset")
    if how == "folder":
        read = datasets.load_dataset(str(tmp_path / "export"), cache_dir=str(tmp_path / "cache"))["train"]
    else:
        files = str(tmp_path / "export" / "data" / "train*.tar")
        read = datasets.load_dataset("webdataset", data_files={"train": files}, cache_dir=str(tmp_path / "cache"))[
            "train"
        ]
    told = {row["json"]["prompt"]: row for row in read}
    assert len(told) == len(groups)
    for given in groups:
        row = told[given.prompt]
        assert json.loads(row["json"]["metadata"]) == given.metadata
        assert row["json"]["preference"] == list(given.preference)
        names = [name for name in read.column_names if name.endswith(".png")]
        assert [name for name in names if row[name] is not None] == [f"{i}.png" for i in range(len(given.images))]
        assert row["0.png"].size == (24, 16)


def test_images_of_several_formats_open_as_a_folder(tmp_path: Path) -> None:
    groups = [ImportedGroup(f"p{n}", (PNG[0], JPEG[1]) if n % 2 else (JPEG[0], PNG[1]), (1, 0), "x") for n in range(6)]
    write_imported(groups, tmp_path / "data")
    export(PreferenceDataset(tmp_path / "data"), tmp_path / "export", "webdataset")
    read = datasets.load_dataset(str(tmp_path / "export"), cache_dir=str(tmp_path / "cache"))["train"]
    assert {name for name in read.column_names if "." in name} == {"0.jpg", "0.png", "1.jpg", "1.png"}
    assert sum(row[name] is not None for row in read for name in row if "." in name) == 12


def test_members_of_a_group_follow_each_other(tmp_path: Path) -> None:
    """What the webdataset package asks for: one key, the name up to its first dot, and one run of members for each."""
    write_imported(CASES["groups of two to four"], tmp_path / "data")
    export(PreferenceDataset(tmp_path / "data"), tmp_path / "export", "webdataset")
    (path,) = (tmp_path / "export" / "data").glob("*.tar")
    with tarfile.open(path) as tar:
        keys = [name.rpartition("/")[2].partition(".")[0] for name in tar.getnames()]
    runs = [key for n, key in enumerate(keys) if n == 0 or keys[n - 1] != key]
    assert len(runs) == len(set(runs)) == 20
