"""Labels, columns and tags that are called as our own columns are refused, before anything is scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffalign.data.prompts import PromptRow
from diffalign.errors import DiffalignError
from diffalign.evaluation.evaluate import EvaluationPlan, summarise
from diffalign.rewards import REWARDS, Reward, load_reward
from diffalign.rewards.base import TAKEN_COLUMNS, TAKEN_NAMES
from diffalign.scoring.spec import parse
from helpers import pictures
from helpers.command_line import run


class Columns(Reward):
    """A reward with columns of the test's choice."""

    name = "columns"
    columns = ("score",)
    range = (0.0, 1.0)
    licence = weights = "none"
    reads = ()

    def __init__(self, columns: str = "score") -> None:
        self.columns = tuple(columns.split("+"))
        self.reasons = []

    def measure(self, images: list[Any], prompts: list[str], metadata: Any = None) -> dict[str, torch.Tensor]:
        return {column: torch.zeros(len(images)) for column in self.columns}


class Prompt(Columns):
    """A reward that calls itself as a column of every table."""

    name = "prompt"


@pytest.mark.parametrize("label", TAKEN_NAMES)
def test_labels_of_our_own_columns(tmp_path: Path, label: str, capsys: pytest.CaptureFixture[str]) -> None:
    pictures.smooth(1).save(tmp_path / "a.png")
    out = tmp_path / "o.jsonl"
    assert run("score", tmp_path / "a.png", "-r", "sharpness", "-o", out) == 0
    before = out.read_bytes()
    capsys.readouterr()
    assert run("score", tmp_path / "a.png", "-r", f"{label}=sharpness", "-o", out, "--html", tmp_path / "o.html") == 2
    assert f"{label} is a column of every table" in capsys.readouterr().err
    assert out.read_bytes() == before and not (tmp_path / "o.html").exists()


@pytest.mark.parametrize("label", ["", "a.b", "a/b", "../a", "a b", "a\n", "a\x1b", "größe"])
def test_labels_of_another_form(label: str) -> None:
    with pytest.raises(DiffalignError, match="write NAME"):
        parse(f"{label}=sharpness")


@pytest.mark.parametrize("columns", [*TAKEN_COLUMNS, "score+reason", "score+score"])
def test_columns_of_another_package(columns: str) -> None:
    with pytest.raises(DiffalignError, match="calls a column"):
        load_reward(f"{__name__}:Columns", columns=columns)


def test_the_name_of_another_package(tmp_path: Path) -> None:
    with pytest.raises(DiffalignError, match="calls itself prompt"):
        load_reward(f"{__name__}:Prompt")
    assert load_reward(f"{__name__}:Columns").columns == ("score",)


def test_our_own_rewards_keep_their_names() -> None:
    for name, kind in REWARDS.items():
        assert name not in TAKEN_NAMES and not set(kind.columns) & set(TAKEN_COLUMNS)


@pytest.mark.parametrize("tag", ["all", ["a"], {"a": 1}, 7, None])
def test_a_tag_does_not_replace_the_whole(tag: Any) -> None:
    rows = [PromptRow("a", {"tag": tag}), PromptRow("b", {"tag": "x"})]
    plan = EvaluationPlan(rows, seeds=1)
    scores = {model: {"r": np.array([[0.0], [1.0]])} for model in ("base", "tuned")}
    found = summarise(scores, plan)["r"]
    assert found["all"]["prompts"] == 2
    assert json.dumps(found)
