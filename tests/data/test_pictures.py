"""Images of a dataset as plain files: their names, their bytes, and that `score` finds the prompts."""

import json
from pathlib import Path

import pytest
from PIL import Image

from diffalign.data.dataset import PreferenceDataset
from diffalign.data.pictures import write_pictures
from diffalign.data.writer import write_groups
from diffalign.stages.score import ScoreRequest, score
from helpers.small_datasets import group_rows, write_images


@pytest.mark.parametrize("prompt", ["A red, round circle!", "../../etc/passwd", "日本", "", "x" * 500, "a\nb/c\\d"])
def test_every_image_is_a_file_named_by_its_prompt(prompt: str, tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "look" / "here"
    write_images(data)
    write_groups(data, [row | {"prompt": prompt if row["group_id"] == "a" else row["prompt"]} for row in group_rows()])
    dataset = PreferenceDataset(data)
    for _ in range(2):  # the same command again writes the same files
        assert write_pictures(dataset, out) == 8
    files = sorted(path.name for path in out.iterdir())
    assert len(files) == 9 and files[-1] == "metadata.jsonl" and all(len(name) < 90 for name in files)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "look"]
    rows = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows][:3] == [prompt] * 3
    for row, image in zip(rows, [i for g in "abc" for i in dataset.images(g)], strict=True):
        assert (out / row["file_name"]).read_bytes() == image.data and row["seed"] == image.seed
        assert Image.open(out / row["file_name"]).size == (16, 16)
    if prompt.startswith("A"):
        assert files[0] == "0000-a-red-round-circle-0.png" and files[3] == "0001-prompt-b-0.png"


def test_score_reads_the_folder(tmp_path: Path) -> None:
    write_images(tmp_path / "data")
    write_groups(tmp_path / "data", group_rows())
    write_pictures(PreferenceDataset(tmp_path / "data"), tmp_path / "look")
    request = ScoreRequest([str(tmp_path / "look")], ["sharpness"], output=tmp_path / "s.jsonl")
    assert not score(request)
    rows = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert sorted(row["prompt"] for row in rows) == ["prompt a"] * 3 + ["prompt b"] * 3 + ["prompt c"] * 2


def test_geneval_judges_the_folder_as_it_judges_the_dataset(tmp_path: Path) -> None:
    facts = {
        "tag": "counting",
        "include": [{"class": "circle", "count": 2}],
        "exclude": [{"class": "circle", "count": 3}],
    }
    write_images(tmp_path / "data")
    write_groups(tmp_path / "data", [row | {"metadata": facts} for row in group_rows()])
    write_pictures(PreferenceDataset(tmp_path / "data"), tmp_path / "look")
    found = []
    for source in ("data", "look"):
        request = ScoreRequest(
            [str(tmp_path / source)], ["geneval:detector=shapes"], output=tmp_path / f"{source}.jsonl"
        )
        assert not score(request)
        rows = [json.loads(line) for line in request.output.read_text().splitlines()]
        found.append([row["geneval"] for row in rows])
    assert len(found[0]) == 8 and found[0] == found[1]
