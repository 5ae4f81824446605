"""GenEval's facts as people store them: the same verdicts from jsonl, csv and parquet, a reason for malformed ones."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffalign.data.prompts import read_prompts
from diffalign.files.facts import fault_of_facts, geneval_facts
from diffalign.rewards.detection import Detection
from diffalign.rewards.geneval import GenEvalReward
from diffalign.scoring.sources import collect
from helpers import pictures

CIRCLE = {"class": "circle", "count": 1}
ROWS: list[dict[str, Any]] = [
    {"prompt": "a circle", "tag": "single_object", "include": [CIRCLE]},
    {"prompt": "a red circle", "tag": "colors", "include": [{**CIRCLE, "color": "red"}]},
    {"prompt": "two", "tag": "counting", "include": [{**CIRCLE, "count": 2}], "exclude": [{**CIRCLE, "count": 3}]},
    {"prompt": "p", "tag": "position", "include": [CIRCLE, {"class": "box", "count": 1, "position": ["above", 0]}]},
]


class OneRedCircle:
    def detect(self, images: list[Image.Image]) -> list[list[Detection]]:
        return [[Detection("circle", (10.0, 10.0, 20.0, 20.0), 0.99, "red")] for _ in images]


def stored(folder: Path, ending: str) -> Path:
    """Parquet's position is text, since arrow has no list of a text and a number; so other writers pack include as JSON."""
    path = folder / f"p.{ending}"
    packed = [{k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in ROWS]
    if ending == "jsonl":
        path.write_text("\n".join(map(json.dumps, ROWS)))
    elif ending == "csv":
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, ["prompt", "tag", "include", "exclude"])
            writer.writeheader()
            writer.writerows(packed)
    elif ending == "packed.parquet":
        pq.write_table(pa.Table.from_pylist(packed), path)
    else:  # structs, in which arrow fills what a clause lacks with nulls
        pq.write_table(pa.Table.from_pylist([{"exclude": None, **row} for row in ROWS[:3]]), path)
    return path


@pytest.mark.parametrize("ending", ["jsonl", "csv", "packed.parquet", "parquet"])
def test_equal_verdicts_whatever_the_file(tmp_path: Path, ending: str) -> None:
    rows = read_prompts(stored(tmp_path, ending))
    reward = GenEvalReward(OneRedCircle())
    facts = [row.metadata for row in rows]
    assert [reward.reason_not_scorable(row.prompt, row.metadata) for row in rows] == [""] * len(rows)
    columns = reward.measure([pictures.smooth(1)] * len(rows), [row.prompt for row in rows], facts)
    assert columns["official"].tolist() == [1.0, 1.0, 0.0, 0.0][: len(rows)]
    assert columns["dense"].tolist() == pytest.approx([1.0, 1.0, 0.5, 1 / 3][: len(rows)])


def test_parquet_of_images_with_facts(tmp_path: Path) -> None:
    data = pictures.encoded(pictures.smooth(1), "PNG")
    pq.write_table(
        pa.Table.from_pylist([{"image": data, "exclude": None, **row} for row in ROWS[:3]]), tmp_path / "i.parquet"
    )
    assert [item.metadata for item in collect([str(tmp_path / "i.parquet")])] == [
        {k: v for k, v in row.items() if k != "prompt"} for row in ROWS[:3]
    ]


@pytest.mark.parametrize(
    ("facts", "fault"),
    [
        ({}, "no GenEval metadata"),
        ({"include": []}, "no GenEval metadata"),
        ({"include": {"class": "cat", "count": 1}}, "include is no list"),
        ({"include": [{"class": "cat"}]}, r"include\[0\]: count None is no whole number"),
        ({"include": [{"class": "cat", "count": "1"}]}, "count '1' is no whole number"),
        ({"include": [{"class": "cat", "count": 0}]}, "count 0 is no whole number"),
        ({"include": [{"class": "cat", "count": True}]}, "count True is no whole number"),
        ({"include": [{"count": 1}]}, "no class"),
        ({"include": ["cat"]}, "no object"),
        ({"include": [{**CIRCLE, "color": 3}]}, "color 3 is no text"),
        ({"include": [{**CIRCLE, "position": "above"}]}, "is not \\[relation"),
        ({"include": [{**CIRCLE, "position": ["above", 0]}]}, "names no clause before"),
        ({"include": [CIRCLE, {**CIRCLE, "position": ["above", -1]}]}, "names no clause before"),
        ({"include": [CIRCLE], "exclude": [{"class": "cat"}]}, r"exclude\[0\]: count None"),
        ({"include": "[{broken"}, "include is no list"),
    ],
)
def test_malformed_facts_give_a_reason(facts: dict[str, Any], fault: str) -> None:
    assert re.search(fault, GenEvalReward(OneRedCircle()).reason_not_scorable("a cat", facts))
    assert re.search(fault, fault_of_facts(geneval_facts(facts)))
    for row in ROWS:
        assert fault_of_facts(row) == ""
