"""From pictures to a blind vote, with a rater of known taste: the benchmark at its smallest size."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from diffalign.voting.log import read_votes
from helpers.tastes import redness

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def own_taste() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("own_taste", BENCHMARKS / "own_taste.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["own_taste"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["own_taste"]


def test_from_pictures_to_a_blind_vote(own_taste: ModuleType, tmp_path: Path) -> None:
    size = own_taste.Size(prompts=9, votes=54, steps=1, test=8)
    cell = own_taste.Cell(0, "red")
    own_taste.run_cell(cell, tmp_path, size, "testbed:validation", ["train.groups_per_step=2"])
    folder = cell.folder(tmp_path)
    votes = read_votes(folder / "data" / "votes.jsonl")
    assert len(votes) == 54 and len({frozenset(vote.images) for vote in votes}) == 54
    # A blind vote on each held-out prompt, on sides that are drawn; the pictures are those of the evaluation.
    blind = read_votes(folder / "run" / "votes.jsonl")
    assert len(blind) == 8 and {frozenset(vote.models) for vote in blind} == {frozenset(("base", "tuned"))}
    assert len({vote.models for vote in blind}) == 2
    right = 0
    for vote in blind:
        red = [redness(Image.open(folder / "run" / name)) for name in vote.images]
        right += (red[0] > red[1]) == (vote.answer == "left")
    assert right >= 5  # 10% noise
    found = json.loads((folder / "cell.json").read_text())
    won = [(vote.models[0] == "tuned") == (vote.answer == "left") for vote in blind]
    assert found["win_rate"] == pytest.approx(np.mean(won), abs=0.01) and sum(found["wins"].values()) == sum(won)
    text, pooled = own_taste.table([found])
    assert pooled["red"]["win_rate"] == pytest.approx(np.mean(won)) and "| red, 0 |" in text
