"""Prompt suites from the user's disk, each in its own layout, made here as its authors publish it."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffalign.data.suites import STYLES, SUITES, read_suite
from diffalign.errors import DiffalignError
from helpers.files import write


def read(name: str, path: Path) -> list[tuple[str, str]]:
    return [(row.prompt, row.metadata.get("tag", "")) for row in read_suite(name, path)]


def test_tables(tmp_path: Path) -> None:
    parti = write(
        tmp_path / "P.tsv", 'Prompt\tCategory\tChallenge\tNote\na cat, "asleep"\tAnimals\tBasic\t\n\tx\ty\t\n'
    )
    assert read("partiprompts", parti) == [('a cat, "asleep"', "Animals")]
    draw = write(tmp_path / "d.csv", '\ufeffPrompts,Category\n"a dog, a cat",Counting\na dog,Colors\na dog,Text\n')
    assert read("drawbench", draw) == [("a dog, a cat", "Counting"), ("a dog", "Colors")]
    captions = write(tmp_path / "p.csv", "caption,image_0\na house,x\na house,y\n")
    assert read("pickapic", captions) == [("a house", "")]
    pq.write_table(pa.table({"caption": ["a", "b", "a"]}), tmp_path / "p.parquet")
    assert read("pickapic", tmp_path / "p.parquet") == [("a", ""), ("b", "")]
    lines = write(tmp_path / "p.jsonl", '{"caption": "a"}\n\n{"caption": "c"}\n')
    assert read("pickapic", lines) == [("a", ""), ("c", "")]


def test_folders(tmp_path: Path) -> None:
    for style in (*STYLES, "drawbench"):
        write(tmp_path / "hps" / f"{style}.json", json.dumps([f"{style} one", f"{style} two"]))
    assert read("hpsv2", tmp_path / "hps")[1:3] == [("anime two", "anime"), ("concept-art one", "concept-art")]
    assert len(read("hpsv2", tmp_path / "hps")) == 8  # what lies beside them is another suite's
    write(tmp_path / "dpg" / "12.txt", "a long\nprompt \n")
    assert read_suite("dpgbench", tmp_path / "dpg")[0].metadata == {"item": "12"}
    assert read("dpgbench", tmp_path / "dpg") == [("a long prompt", "")]
    write(tmp_path / "t2i" / "color_val.txt", "a red dog\n\na blue cat\n")
    write(tmp_path / "t2i" / "3d_spatial_val.txt", "a dog behind a cat")
    assert read("t2i-compbench", tmp_path / "t2i") == [
        ("a dog behind a cat", "3d_spatial"),
        ("a red dog", "color"),
        ("a blue cat", "color"),
    ]


def test_geneval_keeps_its_facts(tmp_path: Path) -> None:
    row = {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}
    found = read_suite("geneval", write(tmp_path / "evaluation_metadata.jsonl", json.dumps(row)))
    assert found[0].prompt == "a photo of a bench" and found[0].metadata["include"] == row["include"]


@pytest.mark.parametrize("name", sorted(SUITES))
def test_an_absent_suite_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(DiffalignError, match=f"suite:{name}:PATH: .*does not exist"):
        read_suite(name, tmp_path / "nowhere")


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(DiffalignError, match="did you mean drawbench"):
        read_suite("drawbenhc", tmp_path)
    with pytest.raises(DiffalignError, match="no column 'Prompts'; it has a, b"):
        read_suite("drawbench", write(tmp_path / "x.csv", "a,b\n1,2\n"))
    with pytest.raises(DiffalignError, match="anime.json: No such file"):
        read_suite("hpsv2", tmp_path)
    with pytest.raises(DiffalignError, match="a list of prompts is expected"):
        read_suite("hpsv2", write(tmp_path / "h" / "anime.json", "{}").parent)
    with pytest.raises(DiffalignError, match="not UTF-8 at byte"):
        (tmp_path / "bad.csv").write_bytes(b"Prompts,Category\n\xff,x\n")
        read_suite("drawbench", tmp_path / "bad.csv")
    with pytest.raises(DiffalignError, match="holds no prompt"):
        read_suite("t2i-compbench", write(tmp_path / "e" / "color_val.txt", "\n").parent)
