"""Archives and saved data sets: `data convert` and `score` read what a folder with the same files would give."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import tarfile
import tempfile
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffalign.data import containers
from diffalign.data.convert import import_pairs, open_rows
from diffalign.data.dataset import PreferenceDataset
from diffalign.data.dataset_export import export
from diffalign.data.imported import ImportedGroup, Report, write_imported
from diffalign.errors import DiffalignError
from diffalign.scoring.sources import collect
from helpers import pictures

PNG = [pictures.encoded(pictures.smooth(n, 24, 16), "PNG") for n in range(4)]
ROWS = [{"file_name": f"{n}.png", "text": "a cat", "score": n} for n in range(3)]
IMAGEFOLDER = {**{f"{n}.png": PNG[n] for n in range(3)}, "metadata.jsonl": "\n".join(map(json.dumps, ROWS)).encode()}
TABLE = {"0.png": PNG[0], "1.png": PNG[1], "p.csv": b"prompt,winner,loser\na cat,1.png,0.png\n"}
SIDES = {"w/a.png": PNG[1], "l/a.png": PNG[0], "w/a.txt": b"a cat"}
KINDS = ["x.zip", "x.tar", "x.tar.gz", "x.tgz", "x.tar.bz2", "x.tar.xz", "X.TAR.GZ"]


def packed(path: Path, files: dict[str, bytes], below: str = "") -> Path:
    if path.suffix.lower() == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in files.items():
                archive.writestr(below + name, data)
        return path
    mode = {"gz": "gz", "tgz": "gz", "bz2": "bz2", "xz": "xz"}.get(path.name.lower().rpartition(".")[2], "")
    with tarfile.open(path, f"w:{mode}") as tar:  # type: ignore[call-overload]
        for name, data in files.items():
            entry = tarfile.TarInfo(below + name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def converted(source: Path, out: Path) -> tuple[Report, list[tuple[str, list[bytes], list[float] | None, str]]]:
    """Return the report, and prompt, images, preference and split of each group."""
    report = write_imported(open_rows([source], None)[1], out)
    dataset = PreferenceDataset(out)
    groups = [dataset.group(i) for i in range(len(dataset))]
    return report, [
        (g["prompt"], [i.data for i in dataset.images(g["group_id"])], g["preference"], g["split"]) for g in groups
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("below", ["", "set/"])
def test_an_imagefolder_in_an_archive(tmp_path: Path, kind: str, below: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    path = packed(tmp_path / kind, IMAGEFOLDER, below)
    assert converted(path, tmp_path / "out")[1] == [("a cat", PNG[:3], [0.0, 0.5, 1.0], "train")]
    items = collect([str(path)])
    assert [(item.key, item.prompt) for item in items] == [(f"{below}{n}.png", "a cat") for n in range(3)]
    assert [item.origin.read() for item in items] == PNG[:3]
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.parametrize("files", [TABLE, SIDES], ids=["csv", "w-l"])
@pytest.mark.parametrize("kind", ["x.zip", "x.tar", "x.tgz"])
def test_pairs_in_an_archive(tmp_path: Path, kind: str, files: dict[str, bytes]) -> None:
    path = packed(tmp_path / kind, files)
    assert converted(path, tmp_path / "out")[1] == [("a cat", [PNG[1], PNG[0]], [1.0, 0.0], "train")]
    import_pairs([path], tmp_path / "pairs")
    assert PreferenceDataset(tmp_path / "pairs").column("prompt") == ["a cat"]


def test_rows_are_named_by_the_archive(tmp_path: Path) -> None:
    path = packed(
        tmp_path / "x.zip", {**TABLE, "p.csv": TABLE["p.csv"] + b"a dog,no.png,0.png\na bird,../0.png,1.png\n"}
    )
    faults = converted(path, tmp_path / "out")[0].faults
    assert [fault.where for fault in faults] == [f"{path}/p.csv:3", f"{path}/p.csv:4"]
    assert f"leaves its folder {path};" in faults[1].reason
    with pytest.raises(DiffalignError, match=r"x\.zip/p\.csv:3: no\.png: "):
        import_pairs([path], tmp_path / "pairs")
    packed(path, {"a.png": PNG[0]})
    with pytest.raises(DiffalignError, match=r"x\.zip: not in a known format"):
        open_rows([path], None)


def test_no_member_leaves_the_folder(tmp_path: Path) -> None:
    evil = {"../evil.png": PNG[0], "/evil.png": PNG[0], "a/../../evil.png": PNG[0], **TABLE}
    for kind in ("x.zip", "x.tar.gz"):
        with containers.unpacked(packed(tmp_path / kind, evil)) as folder:
            assert sorted(p.name for p in folder.rglob("*") if p.is_file()) == ["0.png", "1.png", "p.csv"]
            assert not list(folder.parent.glob("evil*")) and not Path("/evil.png").exists()


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "x.tar.xz", "x.tar.bz2"])
@pytest.mark.parametrize("cut", [0, 40, 0.7])
def test_a_torn_archive_is_one_line(tmp_path: Path, name: str, cut: float) -> None:
    path = packed(tmp_path / name, IMAGEFOLDER)
    data = path.read_bytes()
    path.write_bytes(data[: int(cut * len(data)) if cut < 1 else int(cut)])
    for read in (lambda: collect([str(path)]), lambda: open_rows([path], None)):
        with pytest.raises(DiffalignError) as raised:
            read()
        assert name in str(raised.value) and "\n" not in str(raised.value)


def test_a_full_disk_is_noticed_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, compressed = packed(tmp_path / "x.zip", TABLE), packed(tmp_path / "x.tar.gz", TABLE)
    monkeypatch.setattr(containers, "free_bytes", lambda folder: containers.SPARE)
    for one in (path, compressed):
        with pytest.raises(DiffalignError, match="no room in .* to unpack it"):
            open_rows([one], None)


def test_what_is_skipped_in_an_archive_is_counted(tmp_path: Path) -> None:
    skipped: Counter[str] = Counter()
    packed(tmp_path / "x.tar.gz", {**IMAGEFOLDER, "a.tga": b"x", "b.psd": b"x", "notes": b"x", "inner.tar.gz": b"x"})
    assert len(collect([str(tmp_path / "x.tar.gz")], skipped=skipped)) == 3
    assert skipped == {".tga": 1, ".psd": 1, "without a suffix": 1, ".tar.gz": 1}


def test_our_own_export_compressed(tmp_path: Path) -> None:
    write_imported([ImportedGroup(f"p{n}", (PNG[0], PNG[1]), (1.0, 0.0), "x") for n in range(2)], tmp_path / "data")
    export(PreferenceDataset(tmp_path / "data"), tmp_path / "export", "webdataset")
    (tar,) = (tmp_path / "export" / "data").glob("*.tar")
    tar.with_name("train-0.tar.gz").write_bytes(gzip.compress(tar.read_bytes()))
    tar.unlink()
    for source in (tmp_path / "export", tar.with_name("train-0.tar.gz")):
        assert [prompt for prompt, *_ in converted(source, tmp_path / source.name)[1]] == ["p0", "p1"]


def saved(rows: list[dict[str, Any]], images: tuple[str, ...], many: tuple[str, ...] = ()) -> datasets.Dataset:
    made = datasets.Dataset.from_list(rows)
    for name in images:
        made = made.cast_column(name, datasets.Image())
    for name in many:
        made = made.cast_column(name, datasets.List(datasets.Image()))
    return made


def cell(n: int) -> dict[str, Any]:
    return {"bytes": PNG[n], "path": None}


PAIR = ("a cat", [PNG[1], PNG[0]], [1.0, 0.0])
# Columns of THUDM/ImageRewardDB's script (ImageRewardDB.py: configs 8k, 8k_group, 8k_pair), and of
# data-is-better-together/open-image-preferences-v1-binarized.
SAVED = {
    "pick-a-pic": (
        [{"caption": "a cat", "jpg_0": PNG[1], "jpg_1": PNG[0], "label_0": 1.0, "label_1": 0.0}],
        (),
        (),
        [PAIR],
    ),
    "chosen": ([{"prompt": "a cat", "chosen": cell(1), "rejected": cell(0)}], ("chosen", "rejected"), (), [PAIR]),
    "ImageRewardDB": (
        [{"image": cell(n), "prompt_id": str(n // 3), "prompt": f"p{n // 3}", "rank": 1 + n % 3} for n in (0, 2, 1, 3)],
        ("image",),
        (),
        [("p0", [PNG[0], PNG[2], PNG[1]], [1.0, 0.0, 0.5])],
    ),
    "ImageRewardDB_group": (
        [{"image": [cell(1), cell(0)], "prompt_id": "7", "prompt": "a cat", "rank": [1, 2], "fidelity_rating": [5, 3]}],
        (),
        ("image",),
        [PAIR],
    ),
    "ImageRewardDB_pair": (
        [{"prompt_id": "7", "prompt": "a cat", "img_better": cell(1), "img_worse": cell(0)}],
        ("img_better", "img_worse"),
        (),
        [PAIR],
    ),
}


@pytest.mark.parametrize("case", SAVED)
def test_saved_to_disk_and_as_parquet(tmp_path: Path, case: str) -> None:
    rows, images, many, wanted = SAVED[case]
    made = saved(rows, images, many)
    made.save_to_disk(str(tmp_path / "one"))
    made.to_parquet(str(tmp_path / "shards.parquet"))
    datasets.DatasetDict({"train": made, "test": made}).save_to_disk(str(tmp_path / "splits"))
    for source in ("one", "shards.parquet"):
        found = converted(tmp_path / source, tmp_path / f"out-{source}")[1]
        assert [group[:3] for group in found] == wanted, source
    if case != "ImageRewardDB":  # whose groups are those of one prompt, whatever the file
        splits = converted(tmp_path / "splits", tmp_path / "both")[1]
        assert sorted(split for *_, split in splits) == ["test", "train"]


def test_a_damaged_page_costs_its_row_group(tmp_path: Path) -> None:
    """Of Pick-a-Pic, and of rows with an image each: a parquet file with one row group overwritten in the middle."""
    rows = [{"caption": f"p{n}", "jpg_0": PNG[1], "jpg_1": PNG[0], "label_0": 1.0, "label_1": 0.0} for n in range(3)]
    path = tmp_path / "p.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=1, compression="gzip")
    chunk = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(data)
    report, found = converted(path, tmp_path / "out")
    assert [prompt for prompt, *_ in found] == ["p0", "p2"] and "cannot be read" in report.faults[0].reason


def test_the_shell_says_what_was_unpacked(tmp_path: Path) -> None:
    """Made by other programs than Python's: GNU tar."""
    for name, data in IMAGEFOLDER.items():
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set" / name).write_bytes(data)
    subprocess.run(["tar", "-czf", "x.tar.gz", "set"], cwd=tmp_path, check=True)
    assert converted(tmp_path / "x.tar.gz", tmp_path / "out")[1][0][1] == PNG[:3]


def test_the_types_of_other_writers(tmp_path: Path) -> None:
    """polars writes large strings, large binaries and large lists; pandas' categories are dictionaries."""
    for n in range(2):
        (tmp_path / f"{n}.png").write_bytes(PNG[n])
    names = pa.array(["1.png", "0.png"])
    tables = {
        "names": {"image_path": names.cast(pa.large_string()), "prompt": pa.array(["a cat"] * 2, pa.large_string())},
        "categories": {"image_path": names.dictionary_encode(), "prompt": pa.array(["a cat"] * 2).dictionary_encode()},
        "bytes": {"image": pa.array([PNG[1], PNG[0]], pa.large_binary()), "prompt": pa.array(["a cat"] * 2)},
        "lists": {
            "image": pa.array(
                [[cell(1), cell(0)]], pa.large_list(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
            ),
            "prompt": pa.array(["a cat"], pa.large_string()),
        },
    }
    for name, columns in tables.items():
        rank = pa.array([[1, 2]], pa.large_list(pa.int8())) if name == "lists" else pa.array([1, 2])
        pq.write_table(pa.table({**columns, "rank": rank}), tmp_path / f"{name}.parquet")
        found = converted(tmp_path / f"{name}.parquet", tmp_path / f"out-{name}")[1]
        assert [group[:3] for group in found] == [PAIR], name
