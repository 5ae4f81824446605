"""Other people's data: each reader on a small sample in the genuine layout, and on broken ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffalign.cli import app
from diffalign.data.convert import guess_form, open_rows
from diffalign.data.dataset import PreferenceDataset
from diffalign.data.imported import vote_shares_of_ranks, write_imported
from diffalign.errors import DiffalignError


def jpg(value: int) -> bytes:
    import io

    buffer = io.BytesIO()
    picture(value).save(buffer, format="JPEG")
    return buffer.getvalue()


def picture(value: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(value).integers(0, 256, (12, 16, 3), dtype=np.uint8))


def put(path: Path, value: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpg(value))
    return path


def converted(tmp_path: Path, *sources: Path, form: str | None = None) -> tuple[Any, PreferenceDataset]:
    _, rows = open_rows(list(sources), form)
    out = tmp_path / "out"
    report = write_imported(rows, out)
    return report, PreferenceDataset(out)


def pictures(dataset: PreferenceDataset, i: int) -> list[bytes]:
    return [image.data for image in dataset.images(dataset.column("group_id")[i])]


def pickapic_rows() -> list[dict[str, Any]]:
    """The columns of yuvalkirstain/pickapic_v2: a plain pair, a tie, one without a label, the other order."""
    common = {
        "are_different": True,
        "has_label": True,
        "model_0": "sdxl",
        "model_1": "dream",
        "num_example_per_prompt": 1,
    }
    made = [("a dog", 1.0, 0.0), ("a dog", 0.5, 0.5), ("a cat", 1.0, 0.0), ("a bird", 0.0, 1.0)]
    rows = [
        {
            **common,
            "caption": c,
            "label_0": a,
            "label_1": b,
            "jpg_0": jpg(2 * n),
            "jpg_1": jpg(2 * n + 1),
            "ranking_id": n,
        }
        for n, (c, a, b) in enumerate(made)
    ]
    rows[2]["has_label"] = False
    return rows


def test_pickapic(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(pickapic_rows()), folder / "train-00000-of-00001-abc.parquet")
    pq.write_table(pa.Table.from_pylist(pickapic_rows()[:1]), folder / "validation_unique-00000-of-00001.parquet")
    with pytest.raises(SystemExit) as left:
        app(["data", "convert", str(folder), "--out", str(tmp_path / "out")], prog_name="diffalign")
    said = capsys.readouterr().out
    assert left.value.code == 0 and "1 rows skipped: ties" in said and "1 rows skipped: without a label" in said
    assert "pickapic: 3 groups, 6 images" in said
    dataset = PreferenceDataset(tmp_path / "out")
    assert dataset.column("prompt") == ["a dog", "a bird", "a dog"]
    assert dataset.column("preference") == [[1, 0], [0, 1], [1, 0]]
    assert dataset.column("split") == ["train", "train", "validation"]
    assert pictures(dataset, 1) == [jpg(6), jpg(7)]  # byte for byte
    assert [i.generator for i in dataset.images(dataset.column("group_id")[0])] == ["sdxl", "dream"]


def test_broken_pickapic(tmp_path: Path) -> None:
    rows = pickapic_rows() + [dict(pickapic_rows()[0]) for _ in range(4)]
    rows[4]["label_0"], rows[5]["jpg_1"], rows[6]["jpg_0"], rows[7]["caption"] = 2.0, None, b"text", None
    folder = tmp_path / "data"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    pq.write_table(pa.table({"caption": ["x"], "jpg_0": [b""]}), folder / "b.parquet")
    (folder / "c.parquet").write_bytes(b"PAR1 and no more")
    report, dataset = converted(tmp_path, folder, form="pickapic")
    told = [f"{Path(f.where).name}: {f.reason}" for f in report.faults]
    assert told[:5] == [
        "a.parquet:4: labels 2.0 and 0.0; 1 and 0, 0 and 1, or 0.5 each are known",
        "a.parquet:5: jpg_1 is empty",
        "a.parquet:6: image 0 is not a complete image (not an image of a known format)",
        "a.parquet:7: no caption",
        "b.parquet: column jpg_1, label_0, label_1 is missing",
    ]
    assert told[5].startswith("c.parquet: not a complete parquet file")
    assert report.groups == len(dataset) == 2 and report.counted == {"ties": 1, "without a label": 1}


def test_hpdv2(tmp_path: Path) -> None:
    folder = tmp_path / "HPD"
    for n in range(6):
        put(folder / ("train" if n < 3 else "test") / f"{n:08d}.jpg", n)
    names = [f"{n:08d}.jpg" for n in range(6)]
    train = [
        {"prompt": "a", "file_path": names[:2], "human_preference": [0, 1], "user_hash": "x"},
        {"prompt": "tie", "file_path": names[:2], "human_preference": [1, 1]},
        {"prompt": "range", "file_path": names[:2], "human_preference": [2, 0]},
        {"prompt": "gone", "file_path": ["00009999.jpg", names[0]], "human_preference": [1, 0]},
        {"prompt": "out", "file_path": ["../../secret.jpg", names[0]], "human_preference": [1, 0]},
        "no object",
        {"prompt": "b", "file_path": names[1:3], "human_preference": [1, 0]},
    ]
    test = [{"prompt": "c", "image_path": names[3:], "rank": [2, 1, 3], "raw_annotations": []}]
    test.append({"prompt": "short", "image_path": names[3:], "rank": [1, 2], "raw_annotations": []})
    (folder / "train.json").write_text(json.dumps(train))
    (folder / "test.json").write_text(json.dumps(test))
    assert guess_form(folder) == "hpdv2"
    report, dataset = converted(tmp_path, folder)
    assert dataset.column("prompt") == ["a", "b", "c"] and dataset.column("split") == ["train", "train", "test"]
    assert dataset.column("preference") == [[0, 1], [1, 0], [0.5, 1, 0]] and report.counted == {"ties": 1}
    assert pictures(dataset, 2) == [jpg(3), jpg(4), jpg(5)]
    told = [f"{Path(f.where).name}: {f.reason}" for f in report.faults]
    assert told[0] == "train.json[2]: label out of range: [2, 0]"
    assert told[1] == "train.json[3]: 00009999.jpg: No such file or directory"
    assert told[2].startswith("train.json[4]: path") and "leaves its folder" in told[2]
    assert told[3] == "train.json[5]: an object is expected, not str"
    assert told[4] == "test.json[1]: rank must have 3 values, one an image"


def test_hpdv3(tmp_path: Path) -> None:
    folder = tmp_path / "HPDv3"
    for n in range(4):
        put(folder / "images" / f"{n}.jpg", n)
    rows = [
        {
            "prompt": "a",
            "path1": "images/0.jpg",
            "path2": "images/1.jpg",
            "model1": "flux",
            "model2": "real",
            "confidence": 0.9,
        },
        {"prompt": "b", "path1": "images/2.jpg", "path2": None},
        {"prompt": "c", "path1": "images/3.jpg", "path2": "/etc/passwd"},
        {"prompt": "d", "path1": "images/3.jpg", "path2": "images/2.jpg"},
    ]
    (folder / "train.json").write_text(json.dumps(rows))
    assert guess_form(folder) == "hpdv3"
    report, dataset = converted(tmp_path, folder)
    assert dataset.column("preference") == [[1, 0], [1, 0]] and pictures(dataset, 1) == [jpg(3), jpg(2)]
    assert dataset.group(0)["metadata"] == {"confidence": 0.9}
    assert [i.generator for i in dataset.images(dataset.column("group_id")[0])] == ["flux", "real"]
    told = [f"{Path(f.where).name}: {f.reason}" for f in report.faults]
    assert told[0] == "train.json[1]: path2 is empty" and "'/etc/passwd' leaves its folder" in told[1]
    lines = "".join(json.dumps(row) + "\n" for row in rows) + "{broken\n"
    (folder / "train.json").write_text(lines)  # JSON lines under a .json name, as the hub has it
    faults = [r for r in open_rows([folder], "hpdv3")[1] if hasattr(r, "fault")]
    assert [Path(f.where).name for f in faults][-1] == "train.json:5" and "not JSON" in faults[-1].reason


def test_hpdv3pp(tmp_path: Path) -> None:
    """Two axes in two files, paths relative to the dataset's folder rather than to the file."""
    folder = tmp_path / "datasets"
    for n in range(4):
        put(folder / "images" / "qwen_image" / f"{n}.jpg", n)
    pair = {"path1": "images/qwen_image/0.jpg", "path2": "images/qwen_image/1.jpg", "prompt": "a"}
    other = {"path1": "images/qwen_image/3.jpg", "path2": "images/qwen_image/2.jpg", "prompt": "b"}
    rows = {
        "train/train_aes.json": [pair, {**pair, "path2": "images/none.jpg"}],
        "train/train_tf.json": [other, {**pair, "path1": "../x.jpg"}],
        "test/test_tf.json": [other],
        "train/rollout.json": [{"group_id": "g", "image_path": "images/qwen_image/0.jpg"}],
        "train/stage1_labeled.json": [pair],
    }
    for name, content in rows.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    assert guess_form(folder) == guess_form(folder / "train" / "train_tf.json") == "hpdv3pp"
    report, dataset = converted(tmp_path, folder)
    found = [(dataset.group(i)["split"], dataset.group(i)["metadata"]["axis"]) for i in range(len(dataset))]
    assert found == [("test", "text_following"), ("train", "aesthetic"), ("train", "text_following")]
    assert pictures(dataset, 0) == [jpg(3), jpg(2)] and dataset.group(1)["prompt"] == "a"
    told = [f"{Path(f.where).name}: {f.reason}" for f in report.faults]
    assert told[0].startswith("train_aes.json[1]: none.jpg:") and "'../x.jpg' leaves its folder" in told[1]
    one = [r for r in open_rows([folder / "train" / "train_tf.json"], None)[1] if hasattr(r, "prompt")]
    assert len(one) == 1 and one[0].images[0].name == "3.jpg"
    with pytest.raises(DiffalignError, match="holds none of HPDv3\\+\\+'s files"):
        list(open_rows([folder / "images"], "hpdv3pp")[1])


def test_imagefolder(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for n in range(6):
        put(folder / f"{n}.jpg", n)
    rows: list[Any] = [
        {"file_name": "0.jpg", "text": "a", "score": 3.5},
        {"file_name": "1.jpg", "text": "a", "score": 9},
        {"file_name": "2.jpg", "text": "a", "score": 1, "model": "m"},
        {"file_name": "3.jpg", "prompt": "b", "group_id": "x", "preference": 2},
        {"file_name": "4.jpg", "prompt": "b", "group_id": "x", "preference": 0},
        {"chosen_file_name": "4.jpg", "rejected_file_name": "5.jpg", "prompt": "c", "source": "me"},
        {"file_name": "5.jpg"},
        {"file_name": "0.jpg", "text": "d", "score": 1},
        {"file_name": "1.jpg", "text": "d"},
    ]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "[1]\n")
    report, dataset = converted(tmp_path, folder)
    assert dataset.column("prompt") == ["c", "a"]  # pairs stand alone, groups end with the file
    assert dataset.column("preference") == [[1, 0], [0.5, 1, 0]] and dataset.group(0)["metadata"] == {"source": "me"}
    assert pictures(dataset, 1) == [jpg(0), jpg(1), jpg(2)]
    told = sorted(f"{Path(f.where).name}: {f.reason}" for f in report.faults)
    assert told == [
        "metadata.jsonl:10: an object is expected, not list",
        "metadata.jsonl:4: preference out of range: [2.0, 0.0]; it lies in [0, 1]",
        "metadata.jsonl:7: no prompt or text",
    ]
    assert report.counted == {"fewer than two images have a label": 1}


def test_folders_of_winners_and_losers(tmp_path: Path) -> None:
    folder = tmp_path / "pairs"
    for n, side in enumerate(("w", "l")):
        for k in range(3):
            put(folder / side / f"{k}.jpg", 10 * n + k)
    put(folder / "l" / "9.jpg", 9)
    (folder / "w" / "0.txt").write_text("a dog")
    (folder / "l" / "1.txt").write_text("a cat")
    assert guess_form(folder) == "w_l"
    report, dataset = converted(tmp_path, folder)
    assert dataset.column("prompt") == ["a dog", "a cat"] and pictures(dataset, 1) == [jpg(1), jpg(11)]
    told = [f"{Path(f.where).name}: {f.reason}" for f in report.faults]
    assert told[0] == "2.jpg: no caption; write it into 2.txt beside it"
    assert told[1].startswith("9.jpg: no image of the same name in")
    again = [r for r in open_rows([folder / "w", folder / "l"], None)[1] if not hasattr(r, "fault")]
    assert len(again) == 2


def test_csv_goes_on_after_a_broken_row(tmp_path: Path) -> None:
    folder = tmp_path / "csv"
    put(folder / "a.jpg", 0), put(folder / "b.jpg", 1)
    (folder / "p.csv").write_text(
        "prompt,winner,loser\nx,a.jpg,b.jpg\ny,a.jpg,\nz,../a.jpg,b.jpg\nv,a.jpg,no.jpg\nw,b.jpg,a.jpg\n"
    )
    report, dataset = converted(tmp_path, folder / "p.csv")
    assert dataset.column("prompt") == ["x", "w"]
    assert [Path(f.where).name for f in report.faults] == ["p.csv:3", "p.csv:4", "p.csv:5"]


def test_what_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(DiffalignError, match="no such file or folder"):
        open_rows([tmp_path / "nowhere"], None)
    with pytest.raises(DiffalignError, match="hf download owner/pairs --repo-type dataset --local-dir pairs"):
        open_rows([Path("owner/pairs")], None)
    with pytest.raises(DiffalignError, match="not in a known format; name it with --format"):
        open_rows([tmp_path], None)
    (tmp_path / "x.json").write_text('{"a": 1}\n{"a": 2}\n')
    with pytest.raises(DiffalignError, match="rows with a fit no known format"):
        open_rows([tmp_path / "x.json"], None)
    (tmp_path / "y.json").write_text("nonsense")
    with pytest.raises(DiffalignError, match=r"y\.json: not JSON"):
        open_rows([tmp_path / "y.json"], None)
    (tmp_path / "train.json").write_text('[{"prompt": "a", "path1": "no.jpg", "path2": "no.jpg"}]')
    with pytest.raises(
        DiffalignError, match=r"no row gives a group.*; the first: .*train\.json\[0\]: no\.jpg: No such"
    ):
        write_imported(open_rows([tmp_path / "train.json"], None)[1], tmp_path / "out")
    (tmp_path / "p.csv").write_bytes(b"prompt,winner,loser\ncaf\xe9,a,b\n")
    with pytest.raises(DiffalignError, match=r"p\.csv: not UTF-8 at byte"):
        list(open_rows([tmp_path / "p.csv"], None)[1])
    (tmp_path / "p.csv").write_text("prompt,best\na,b\n")
    with pytest.raises(DiffalignError, match=r"p\.csv:1: column winner is missing .*; there are prompt, best"):
        list(open_rows([tmp_path / "p.csv"], None)[1])
    with pytest.raises(DiffalignError, match="--format x: unknown; there are pickapic"):
        open_rows([tmp_path], "x")


def test_ranks() -> None:
    assert vote_shares_of_ranks([1, 2, 3]) == (1.0, 0.5, 0.0)
    assert vote_shares_of_ranks([1, 1, 2]) == (0.5, 0.5, 0.0)


@pytest.mark.parametrize("bad", [None, "", "nan", "inf", float("nan"), float("inf"), "-inf", "good", True])
@pytest.mark.parametrize("label", ["score", "rank", "preference"])
def test_a_label_that_is_no_finite_number_is_absent(tmp_path: Path, label: str, bad: Any) -> None:
    """In an imagefolder: the images with a label keep their order, the other is kept in no pair, and counted."""
    folder = tmp_path / "folder"
    for n in range(3):
        put(folder / f"{n}.jpg", n)
    best_first = {"score": (9, 1), "rank": (1, 2), "preference": (1, 0)}[label]
    rows: list[dict[str, Any]] = [{"file_name": f"{n}.jpg", "text": "a"} for n in range(3)]
    rows[0][label], rows[1][label], rows[2][label] = best_first[0], bad, best_first[1]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    report, dataset = converted(tmp_path, folder)
    assert report.groups == 1 and report.unlabelled == 1 and not report.faults and not report.counted
    (group,) = (dataset.group(i) for i in range(len(dataset)))
    assert group["preference"] == [1, 0] and dataset.members(group["group_id"]) == [0, 2]
    assert len(pictures(dataset, 0)) == 2
    assert sum(1 for rows in dataset.iter_images() for _ in rows) == 3


@pytest.mark.parametrize("bad", ["nan", "inf", None])
def test_a_group_without_two_labels_is_counted_and_no_tie(tmp_path: Path, bad: str | None) -> None:
    folder = tmp_path / "folder"
    for n in range(5):
        put(folder / f"{n}.jpg", n)
    rows = [{"file_name": f"{n}.jpg", "text": "ab"[n // 2], "score": [bad, bad, 3, bad][n]} for n in range(4)]
    rows += [{"file_name": f"{n}.jpg", "text": "c", "score": n} for n in (3, 4)]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    report, dataset = converted(tmp_path, folder)
    nobody = bad is None  # a group for which nobody gave a label is kept without a preference
    assert dataset.column("prompt") == (["a", "c"] if nobody else ["c"])
    assert report.counted == {"fewer than two images have a label": 1 if nobody else 2}
