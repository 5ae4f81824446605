"""Prompts of a dataset on the hub: the column is found as in every other table, and GenEval's facts come with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffalign.data.prompts import hub_prompts, read_prompts
from diffalign.errors import DiffalignError
from diffalign.stages.resolve import resolve_prompts

FACTS = {"tag": "position", "include": [{"class": "cat", "count": 1}]}


def dataset(folder: Path, rows: list[dict[str, Any]]) -> str:
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    return str(folder)


@pytest.mark.parametrize("name", ["prompt", "text", "caption", "Prompt", "TEXT", " caption "])
def test_the_column_is_found_under_its_usual_names(tmp_path: Path, name: str) -> None:
    source = dataset(tmp_path / "hub", [{"id": n, name: f"a cat {n}"} for n in range(3)])
    assert [row.prompt for row in hub_prompts(source, "prompt", "train")] == [f"a cat {n}" for n in range(3)]
    assert [row.prompt for row in resolve_prompts(f"hub:{source}", 2)] == ["a cat 0", "a cat 1"]


def test_a_named_column_is_not_replaced(tmp_path: Path) -> None:
    source = dataset(tmp_path / "hub", [{"caption": "a", "long": "b"}])
    assert [row.prompt for row in hub_prompts(source, "long", "train")] == ["b"]
    with pytest.raises(DiffalignError, match="hub:.*: no column 'longer'; it has caption, long"):
        hub_prompts(source, "longer", "train")
    with pytest.raises(DiffalignError, match="no column 'prompt'; it has words"):
        hub_prompts(dataset(tmp_path / "other", [{"words": "a"}]), "prompt", "train")


def test_facts_come_with_the_prompt_as_from_a_file(tmp_path: Path) -> None:
    source = dataset(
        tmp_path / "hub", [{"caption": "a cat", **FACTS}, {"caption": "a dog", "tag": None, "include": None}]
    )
    found = hub_prompts(source, "prompt", "train")
    assert [row.metadata for row in found] == [FACTS, {}]
    assert found == read_prompts(tmp_path / "hub" / "train.parquet")
