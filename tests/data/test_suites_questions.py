"""Suites with questions for a judge, each in the layout of its repository.

geneval2: github.com/facebookresearch/GenEval2 at a6e82d2. dpgbench: github.com/TencentQQGYLab/ELLA at 3c228f1, dpg_bench/.
unigenbench: github.com/CodeGoat24/UniGenBench at 49d0bce, data/. wise: github.com/PKU-YuanGroup/WISE at eb51174.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from diffalign.data.suites import read_suite
from diffalign.errors import DiffalignError
from helpers.files import write

DPG = (
    "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language\n"
    "midjourney1,A red car.,,1,0,entity,whole,entity - whole (car),Is there a car?\n"
    'midjourney1,A red car.,,2,"1,3",attribute,color,"attribute - color (car, red)",Is the car red?\n'
    "midjourney1,A red car.,,3,0,entity,whole,entity - whole (sky),Is there a sky?\n"
    "posescript2,A man.,,1,0,entity,whole,entity - whole (man),Is there a man?\n"
)


def table(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_geneval2(tmp_path: Path) -> None:
    row = {
        "prompt": "four white cows", "atom_count": 3, "vqa_list": [["How many cows are in the image?", "four"]],
        "skills": ["count"],
    }  # fmt: skip
    path = write(tmp_path / "geneval2_data.jsonl", json.dumps(row) + "\n" + json.dumps(row) + "\n")
    (one,) = read_suite("geneval2", path)
    assert one.prompt == "four white cows" and one.metadata["tag"] == "3" and one.metadata["skills"] == ["count"]
    assert one.metadata["vqa_list"] == row["vqa_list"]
    assert len(read_suite("geneval2", path, unique=False)) == 2
    with pytest.raises(DiffalignError, match=r"x.jsonl:1: .* equal length"):
        read_suite("geneval2", write(tmp_path / "x.jsonl", json.dumps({**row, "skills": []})))


def test_dpgbench(tmp_path: Path) -> None:
    for item, text in (("midjourney1", "A red\ncar.\n"), ("posescript2", "A man.")):
        write(tmp_path / "prompts" / f"{item}.txt", text)
    assert [row.metadata for row in read_suite("dpgbench", tmp_path)] == [
        {"item": "midjourney1"},
        {"item": "posescript2"},
    ]
    write(tmp_path / "dpg_bench.csv", DPG)
    first, second = read_suite("dpgbench", tmp_path)
    assert first.prompt == "A red car."
    assert first.metadata["questions"] == [
        ["Is there a car?", "Yes"], ["Is the car red?", "Yes"], ["Is there a sky?", "Yes"],
    ]  # fmt: skip
    assert first.metadata["dependencies"] == [[0], [1, 3], [0]] and first.metadata["proposition_ids"] == [1, 2, 3]
    assert first.metadata["categories"] == ["entity - whole", "attribute - color", "entity - whole"]
    assert second.metadata["questions"] == [["Is there a man?", "Yes"]]
    write(tmp_path / "prompts" / "new.txt", "A new one.")
    with pytest.raises(DiffalignError, match="no question for new.txt"):
        read_suite("dpgbench", tmp_path)
    write(tmp_path / "dpg_bench.csv", DPG.replace('"1,3"', "one"))
    with pytest.raises(DiffalignError, match=r"dpg_bench.csv:3: .*whole numbers"):
        read_suite("dpgbench", tmp_path)


def test_unigenbench(tmp_path: Path) -> None:
    facts = {
        "Primary Categories": "Art", "Testpoints": ["Style", "Attribute - Color"],
        "Testpoint Description": ["ink painting", "a red, round sun"],
    }  # fmt: skip
    path = table(
        tmp_path / "test_prompts_en.csv",
        [{"index": "0", "prompt_en": 'A "red" sun, painted.', "sub_dims_en": json.dumps(facts)}],
    )
    (one,) = read_suite("unigenbench", path)
    assert one.prompt == 'A "red" sun, painted.' and one.metadata == {
        "tag": "Art", "testpoints": ["Style", "Attribute - Color"], "descriptions": ["ink painting", "a red, round sun"],
    }  # fmt: skip
    chinese = {"一级垂类": "艺术", "考点": ["风格"], "考点对应描述": ["水墨画"]}
    path = table(
        tmp_path / "zh.csv",
        [{"index": "0", "prompt_zh": "太阳", "sub_dims_zh": json.dumps(chinese, ensure_ascii=False)}],
    )
    assert read_suite("unigenbench", path)[0].metadata == {
        "tag": "艺术",
        "testpoints": ["风格"],
        "descriptions": ["水墨画"],
    }
    broken = json.dumps(facts).replace('"Style", ', '"Style" ')
    with pytest.raises(DiffalignError, match=r"b.csv:2: sub_dims_en holds no testpoints .*mend this cell"):
        read_suite(
            "unigenbench",
            table(tmp_path / "b.csv", [{"index": "0", "prompt_en": "a", "sub_dims_en": broken}]),
        )
    with pytest.raises(DiffalignError, match="no column prompt_en or prompt_zh; it has a, b"):
        read_suite("unigenbench", table(tmp_path / "c.csv", [{"a": "1", "b": "2"}]))


def test_wise(tmp_path: Path) -> None:
    rows = [
        {
            "Prompt": f"prompt {k}", "Explanation": "why", "Category": category, "Subcategory": "x", "prompt_id": k,
        }
        for k, category in enumerate(("Cultural knowledge", "time"), start=1)
    ]  # fmt: skip
    for name, row in zip(("cultural_common_sense", "spatio-temporal_reasoning"), rows, strict=True):
        write(tmp_path / "new" / f"{name}_verified.json", json.dumps([row]))
    write(tmp_path / "new" / "merge.json", json.dumps(rows))  # the same again: not read twice
    found = read_suite("wise", tmp_path / "new")
    assert [row.metadata["tag"] for row in found] == ["Cultural knowledge", "time"]
    assert found[0].metadata["explanation"] == "why"
    assert read_suite("wise", tmp_path / "new" / "merge.json") == found
    with pytest.raises(DiffalignError, match="cultural_common_sense.json: No such file"):
        read_suite("wise", write(tmp_path / "empty" / "readme.md", "").parent)
    with pytest.raises(DiffalignError, match="no 'Explanation'; it has Prompt"):
        read_suite("wise", write(tmp_path / "x.json", json.dumps([{"Prompt": "a", "Category": "time"}])))
