"""Tables of pairs and rankings in the forms people have, and our own exports read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffalign.data.convert import guess_form, import_pairs, open_rows
from diffalign.data.dataset import PreferenceDataset
from diffalign.data.dataset_export import export
from diffalign.data.imported import ImportedGroup, Report, write_imported
from diffalign.data.prompts import PromptRow
from diffalign.errors import DiffalignError
from helpers import pictures

PNG = [pictures.encoded(pictures.smooth(n, 24, 16), "PNG") for n in range(3)]


def struct(n: int) -> dict[str, Any]:
    return {"bytes": PNG[n], "path": None}


FORMS: list[dict[str, Any]] = [
    {"prompt": "a cat", "chosen": struct(0), "rejected": struct(1)},
    {"caption": "a cat", "winner": PNG[0], "loser": PNG[1]},
    {"text": "a cat", "image_0": struct(0), "image_1": struct(1), "label": 0},
    {"prompt": "a cat", "image_0": struct(1), "image_1": struct(0), "label": 1},
    {"prompt": "a cat", "image_a": struct(1), "image_b": struct(0), "choice": "B"},
    {"prompt": "a cat", "image1": struct(1), "image2": struct(0), "label": 2},
    {"prompt": "a cat", "image1": struct(0), "image2": struct(1), "votes_image1": 20, "votes_image2": 6},
    {
        "prompt": "a cat",
        "image1": struct(1),
        "image2": struct(0),
        "weighted_results_image1_preference": 0.3,
        "weighted_results_image2_preference": 0.7,
    },
    # Cards of Rapidata's data sets: 700k_Human_Preference_Dataset_FLUX_SD3_MJ_DALLE3, then the t2i_human_preference series,
    # whose preference, not alignment or coherence, is the label.
    {
        "prompt": "a cat",
        "image1": struct(0),
        "image2": struct(1),
        "votes_image1": 20,
        "votes_image2": 6,
        "model1": "flux",
        "model2": "dalle-3",
        "detailed_results": "[]",
        "image1_path": "x/0.jpg",
        "image2_path": "x/1.jpg",
    },
    {
        "prompt": "a cat",
        "image1": struct(1),
        "image2": struct(0),
        "model1": "flux",
        "model2": "dalle-3",
        "weighted_results_image1_alignment": 0.9,
        "weighted_results_image2_alignment": 0.1,
        "weighted_results_image1_preference": 0.3,
        "weighted_results_image2_preference": 0.7,
        "detailed_results_preference": "[]",
    },
    # Card of TIGER-Lab/GenAI-Bench, config image_generation.
    {
        "prompt": "a cat",
        "left_model": "flux",
        "left_image": struct(1),
        "right_model": "dalle-3",
        "right_image": struct(0),
        "vote_type": "rightvote",
    },
    # ImageRewardDB.py of THUDM/ImageRewardDB: configs 8k_pair and 8k_group.
    {"prompt_id": "1", "prompt": "a cat", "classification": "x", "img_better": struct(0), "img_worse": struct(1)},
    {"prompt_id": "1", "prompt": "a cat", "image": [struct(1), struct(0)], "rank": [2, 1], "overall_rating": [1, 5]},
    {"prompt": "a cat", "images": [struct(0), struct(1)], "preference": [1.0, 0.0]},
    {"prompt": "a cat", "generations": [struct(0), struct(1)], "ranking": [1, 2]},
]


def converted(path: Path, out: Path) -> tuple[Report, list[tuple[str, bytes, bytes]]]:
    """Return the report, and prompt, better and worse image of each pair."""
    report = write_imported(open_rows([path], None)[1], out)
    dataset, found = PreferenceDataset(out), []
    for i in range(len(dataset)):
        group = dataset.group(i)
        data = [image.data for image in dataset.images(group["group_id"])]
        ranked = sorted(zip(group["preference"] or [], data, strict=True), key=lambda pair: -pair[0])
        found.append((group["prompt"], ranked[0][1], ranked[-1][1]))
    return report, found


@pytest.mark.parametrize("row", FORMS, ids=lambda row: "-".join(row))
@pytest.mark.parametrize("place", ["one.parquet", "data/train-00000.parquet"])
def test_parquet_with_images(tmp_path: Path, row: dict[str, Any], place: str) -> None:
    path = tmp_path / "in" / place
    path.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist([row]), path)
    source = path if place.startswith("one") else tmp_path / "in"
    assert converted(source, tmp_path / "out")[1] == [("a cat", PNG[0], PNG[1])]


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a cat", "winner": "0.png", "loser": "1.png"},
        {"prompt": "a cat", "chosen": "0.png", "rejected": "1.png"},
        {"prompt": "a cat", "image_a": "1.png", "image_b": "0.png", "choice": "b"},
        {"prompt": "a cat", "image_0": "1.png", "image_1": "0.png", "label": "1"},
    ],
)
def test_both_verbs_read_tables_of_paths(tmp_path: Path, ending: str, row: dict[str, Any]) -> None:
    for n in range(2):
        (tmp_path / f"{n}.png").write_bytes(PNG[n])
    path = tmp_path / f"t.{ending}"
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist([row]), path)
    elif ending == "csv":
        path.write_text(f"{';'.join(row)}\n{';'.join(row.values())}\n")
    else:
        path.write_text(json.dumps(row if ending == "jsonl" else [row]))
    assert converted(path, tmp_path / "out")[1] == [("a cat", PNG[0], PNG[1])]
    import_pairs([path], tmp_path / "again")
    assert PreferenceDataset(tmp_path / "again").column("prompt") == ["a cat"]


def test_broken_rows_cost_only_themselves(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(PNG[0])
    (tmp_path / "1.png").write_bytes(PNG[1])
    good = {"prompt": "a cat", "image_0": "0.png", "image_1": "1.png", "label": 0}
    bad = [
        {"label": "left"},
        {"label": 10**400},
        {"label": 2},
        {"image_0": "../0.png"},
        {"image_0": ""},
        {"image_1": "0.png"},
        {"prompt": " "},
        {"image_1": "none.png"},
    ]
    rows = [good, *({**good, **change} for change in bad), {**good, "label": "tie"}]
    rows += [{**good, "label": label} for label in (None, "", "nan")]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report, found = converted(tmp_path / "t.jsonl", tmp_path / "out")
    assert len(found) == 1 and report.counted == {"ties": 1, "without a label": 3}
    assert len(report.faults) == len(bad)
    assert report.faults[5].reason == "the two images are the same"


def test_image_reward_db(tmp_path: Path) -> None:
    """Rows of ImageRewardDB's metadata: one an image, grouped by prompt_id, rank 1 is the best."""
    for n in range(3):
        (tmp_path / f"{n}.png").write_bytes(PNG[n])
    rows = [{"image_path": f"{n}.png", "prompt_id": "7", "prompt": "a cat", "rank": [2, 1, 3][n]} for n in range(3)]
    (tmp_path / "metadata-train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert guess_form(tmp_path / "metadata-train.jsonl") == "imagefolder"
    assert converted(tmp_path / "metadata-train.jsonl", tmp_path / "out")[1] == [("a cat", PNG[1], PNG[2])]


@pytest.mark.parametrize("form", ["rows", "pickapic", "webdataset"])
def test_own_exports_are_read_back(tmp_path: Path, form: str) -> None:
    facts = {"tag": "position", "include": [{"class": "cat", "count": 1}]}
    groups = [
        ImportedGroup("a cat", (PNG[0], PNG[1], PNG[2]), (0.5, 1.0, 0.0), "x", metadata=facts),
        ImportedGroup("a dog", (PNG[2], PNG[0]), (0.0, 1.0), "x", split="validation"),
    ]
    write_imported(groups, tmp_path / "data")
    export(PreferenceDataset(tmp_path / "data"), tmp_path / "export", form)
    assert converted(tmp_path / "export", tmp_path / "back")[1] == [
        ("a cat", PNG[1], PNG[2]),
        ("a dog", PNG[0], PNG[2]),
    ]
    back = PreferenceDataset(tmp_path / "back")
    assert back.column("split") == ["train", "validation"]
    if form != "pickapic":
        assert back.group(0)["metadata"] == facts and back.column("preference")[0] == [0.5, 1.0, 0.0]


def test_a_damaged_tar_costs_what_is_missing(tmp_path: Path) -> None:
    write_imported([ImportedGroup(f"p{n}", (PNG[0], PNG[1]), (1.0, 0.0), "x") for n in range(3)], tmp_path / "data")
    export(PreferenceDataset(tmp_path / "data"), tmp_path / "export", "webdataset")
    (tar,) = (tmp_path / "export" / "data").glob("*.tar")
    data = tar.read_bytes()
    tar.write_bytes(data[: len(data.rstrip(b"\0")) - 300])
    report, found = converted(tar, tmp_path / "back")
    assert [prompt for prompt, *_ in found] == ["p0", "p1"] and report.faults
    tar.write_bytes(b"no tar")
    with pytest.raises(DiffalignError, match="not a complete tar file"):
        converted(tar, tmp_path / "none")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"vote_type": "tievote"}, "ties"),
        ({"vote_type": "bothbad_vote"}, "ties"),
        ({"vote_type": None}, "without a label"),
        ({"vote_type": float("nan")}, "without a label"),
    ],
)
def test_votes_that_prefer_nothing_are_counted(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    row = {"prompt": "a", "left_image": struct(0), "right_image": struct(1), "left_model": "m", "right_model": "n"}
    rows = [{**row, "vote_type": "leftvote"}, {**row, "vote_type": "rightvote", **change}]
    (tmp_path / "p.parquet").write_bytes(b"")
    pq.write_table(pa.Table.from_pylist([{**r, "vote_type": str(v) if (v := r["vote_type"]) else None} for r in rows]),
                   tmp_path / "p.parquet")  # fmt: skip
    report, found = converted(tmp_path / "p.parquet", tmp_path / "out")
    assert found == [("a", PNG[0], PNG[1])] and report.counted == {reason: 1} and not report.faults
    assert [
        image.generator for image in PreferenceDataset(tmp_path / "out").images(f"0000000-{PromptRow('a').prompt_id}")
    ] == ["m", "n"]


@pytest.mark.parametrize("votes", [(None, None), (float("nan"), float("nan")), (0.4, None)])
def test_pairs_that_nobody_voted_on_are_counted(tmp_path: Path, votes: tuple[float | None, float | None]) -> None:
    """Makers of Rapidata's form write NaN where a pair got no votes."""
    names = [f"weighted_results_image{n}_preference" for n in (1, 2)]
    row = {"prompt": "a", "image1": struct(0), "image2": struct(1)}
    rows = [{**row, names[0]: 0.8, names[1]: 0.2}, {**row, **dict(zip(names, votes, strict=True))}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    report, found = converted(tmp_path / "p.parquet", tmp_path / "out")
    assert len(found) == 1 and report.counted == {"without a label": 1} and not report.faults


@pytest.mark.parametrize("bad", [None, float("nan"), float("inf")])
@pytest.mark.parametrize("labels", [("preference", 1.0, 0.0), ("ranking", 1, 2), ("rank", 1, 2)])
def test_an_image_of_a_list_without_a_label_is_in_no_pair(
    tmp_path: Path, bad: float | None, labels: tuple[str, float, float]
) -> None:
    name, best, worst = labels
    row = {"prompt": "a", "images": [struct(0), struct(2), struct(1)], name: [float(best), bad, float(worst)]}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "p.parquet")
    report, found = converted(tmp_path / "p.parquet", tmp_path / "out")
    assert found == [("a", PNG[0], PNG[1])] and report.unlabelled == 1


def test_a_table_of_texts_about_images_is_not_taken_for_pairs_of_images(tmp_path: Path) -> None:
    """TRL's form for image-text models: `images` are what is asked about, chosen and rejected are answers."""
    row = {"prompt": "what is it?", "images": [struct(0)], "chosen": "a cat", "rejected": "a dog"}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "p.parquet")
    with pytest.raises(DiffalignError, match="a cat: No such file"):
        converted(tmp_path / "p.parquet", tmp_path / "out")
