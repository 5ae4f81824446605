"""GenEval's evaluation_metadata.jsonl beside images in one folder, and given with `--prompts`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from diffalign.errors import DiffalignError
from diffalign.scoring.sources import collect
from diffalign.stages.score import ScoreRequest, score
from helpers import pictures

CLASSES = ("bench", "cat", "dog")
ROWS: list[dict[str, Any]] = [
    {"tag": "single_object", "include": [{"class": c, "count": 1}], "prompt": f"a photo of a {c}"} for c in CLASSES
]


def flat(folder: Path, *names: str) -> Path:
    for n, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pictures.smooth(n).save(folder / name)
    (folder / "evaluation_metadata.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return folder


def classes(folder: Path) -> dict[str, str | None]:
    """Key -> the class that the facts name, None without facts."""
    found = {item.key: (item.metadata.get("include"), item.prompt) for item in collect([str(folder)])}
    assert all(prompt == f"a photo of a {facts[0]['class']}" for facts, prompt in found.values() if facts)
    return {key: facts[0]["class"] if facts else None for key, (facts, _) in found.items()}


@pytest.mark.parametrize(
    "names",
    [
        ("00000.png", "00002.png"),
        ("0.png", "2.png"),
        ("00000_0.png", "00002_3.png"),
        ("0-1.png", "002 (1).png"),
        ("00000/0000.png", "00002/0001.png"),
        ("00000/samples/0007.png", "00002/samples/0001.png"),
    ],
)
def test_by_number(tmp_path: Path, names: tuple[str, str]) -> None:
    assert classes(flat(tmp_path / "in", *names)) == {names[0]: "bench", names[1]: "dog"}


def test_by_prompt_before_number(tmp_path: Path) -> None:
    folder = flat(tmp_path / "in", "0.png", "1.png", "2.png", "x.png")
    (folder / "0.txt").write_text("a photo of a dog\n")
    (folder / "1.txt").write_text("a prompt of my own")
    assert classes(folder) == {"0.png": "dog", "1.png": None, "2.png": "dog", "x.png": None}


@pytest.mark.parametrize("names", [("1.png", "2.png", "3.png"), ("00003.png",), ("20240101.png",)])
def test_numbers_that_no_row_has_are_refused(tmp_path: Path, names: tuple[str, ...]) -> None:
    """Images counted from 1 would all get the facts of another prompt."""
    with pytest.raises(DiffalignError, match=r"png: .*evaluation_metadata\.jsonl has 3 rows, counted from 0"):
        collect([str(flat(tmp_path / "in", *names))])


def test_given_with_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = flat(tmp_path / "in", "00001.png", "00000.png")
    table = tmp_path / "evaluation_metadata.jsonl"
    (folder / table.name).rename(table)
    assert classes(folder) == {"00000.png": None, "00001.png": None}
    request = ScoreRequest([str(folder)], ["geneval:detector=shapes"], prompts=table, output=tmp_path / "o.jsonl")
    assert score(request) == 0
    assert "1 rows have no image that is scored, such as number 2" in capsys.readouterr().err
    prompts = [json.loads(line)["prompt"] for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert prompts == ["a photo of a bench", "a photo of a cat"]
    for name in ("00000", "00001"):
        (folder / f"{name}.png").rename(folder / f"image {name}.png")
    with pytest.raises(DiffalignError, match="none of its 3 rows belongs to an image"):
        score(request)


def test_other_rows_of_that_name_mean_nothing(tmp_path: Path) -> None:
    folder = flat(tmp_path / "in", "0.png")
    for text in ('{"id": "x", "include": [{"class": "cat", "count": 1}]}', '{"prompt": "a cat"}', ""):
        (folder / "evaluation_metadata.jsonl").write_text(text)
        assert classes(folder) == {"0.png": None}
