"""What `rank` and `data inspect` say: the column, near ties, and what cannot be compared."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from helpers.command_line import run
from helpers.small_datasets import scored


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        ([[1, 2, 3]], [[5, 5, 5]], "not comparable: b ties every pair that has both scores (3)"),
        ([[0, 0]], [[1, 1]], "not comparable: a and b tie every pair that has both scores (1)"),
        ([[1, None]], [[None, 1]], "not comparable: no two images of a prompt have both scores"),
        ([[1, 2, 2]], [[1, 1, None]], "not comparable: b ties every pair that has both scores (1)"),
        ([[1, 2], [3, 3]], [[4, 4], [1, 2]], "not comparable: each ties the pairs that the other orders (1 and 1)"),
        ([[1, 2], [3, 4]], [[1, 2], [9, 4]], "agree on 50% of pairs, tau +0.00"),
        ([[1], [2]], [[1], [2]], "not comparable: no two images of a prompt have both scores"),
    ],
)
def test_what_cannot_be_compared_is_named(
    tmp_path: Path, a: list[list[float]], b: list[list[float]], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    scored(tmp_path, {"a": a, "b": b})
    assert run("data", "inspect", tmp_path) == 0
    said = capsys.readouterr().out
    assert "nan" not in said and re.search(rf"^a and b +{re.escape(words)}$", said, re.MULTILINE), said


@pytest.mark.parametrize(
    ("scores", "override", "lines"),
    [
        ({"a": [[1, 2], [3, 4]]}, [], ["of every group differ by 1; min_gap is 0: near ties are kept"]),
        (
            {"a": [[1, 2, 3], [1, 2, 3]], "b": [[1, 2, 3], [1, 3, 2]]},
            [],
            ["differ by 0.75 to 1, median 0.875; min_gap is 0"],
        ),
        (
            {"a": [[1, 2], [3, 3], [1, 3]]},
            ["min_gap=0.5"],
            ["ranked 3 groups by a.score; 4 images count", "min_gap 0.5 dropped 1 group as near ties"],
        ),
        ({"a": [[0, 1], [0, 10]]}, ["aggregate=mean", "min_gap=1"], ["min_gap 1 dropped 1 group as near ties"]),
        (
            {"a": [[2, 2]]},
            [],
            ["ranked 1 group by a.score; 2 images count", "1 group states no preference (all equal)"],
        ),
        ({"a": [[2, 2]]}, ["min_gap=0.1"], ["ranked 1 group by a.score; 0 images count; min_gap 0.1 dropped 1 group"]),
        ({"a": [[1, 2]]}, ["sources=[a.score]"], ["ranked 1 group by a.score; 2 images count"]),
    ],
)
def test_rank_names_the_column_and_what_min_gap_did(
    tmp_path: Path,
    scores: dict[str, list[list[float]]],
    override: list[str],
    lines: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    scored(tmp_path, scores)
    assert run("rank", tmp_path, *override) == 0
    said = capsys.readouterr().out
    for line in lines:
        assert line in said, said
