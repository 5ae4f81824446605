"""The tables of `score` on a terminal of 80 columns: whole names, whole numbers, no line beyond the edge."""

from __future__ import annotations

import io
import math
import re
import subprocess
import sys

import pytest
from rich.console import Console
from rich.table import Table

from diffalign.bench.show import suites_table
from diffalign.bench.suites import SUITES
from diffalign.errors import DiffalignError
from diffalign.rewards import REWARDS, accepted, find_reward
from diffalign.scoring.compare_folders import comparison_table, outcomes
from diffalign.scoring.describe_rewards import written
from diffalign.scoring.human_agreement import Choice, agreement_table
from diffalign.scoring.list_rewards import WRITTEN, rewards_table
from diffalign.scoring.pairing import pair_up
from diffalign.scoring.run import Scores
from diffalign.scoring.score_summary import summarise, summary_table
from diffalign.terminal import name_cell, shortened
from helpers.processes import environment
from helpers.scored_items import made

LABELS = ["pickscore", "jpeg_compressibility", "unifiedreward"]
LONG = "a rather long folder/of my own/with files of/many/different/kinds/and a long name of the file-{}.png"


def scored(values: list[float], side: str = "a") -> Scores:
    scores = made(values, [f"p{i}" for i in range(len(values))], [LONG.format(i) for i in range(len(values))], side)
    scores.columns = {label: (label,) for label in LABELS}
    scores.columns["unifiedreward"] = ("unifiedreward", "alignment")
    for row in scores.rows:
        row |= {f"{label}.reason": "" for label in LABELS}
        row |= {"pickscore": row["r"], "jpeg_compressibility": 100 * row["r"], "unifiedreward": row["r"]}
        row["unifiedreward.alignment"] = row["r"]
    return scores


def lines(table: Table, width: int = 80) -> list[str]:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text().splitlines()


def tables(count: int) -> list[Table]:
    a, b = scored([-1.25 + i for i in range(count)]), scored([-1.5 + 1.1 * i for i in range(count)], "b")
    choices = [Choice(i, i + 1, 1, f"p{i}") for i in range(count - 1)]
    return [
        summary_table(summarise(a), f"{count} images"),
        comparison_table(outcomes(a, b, pair_up(a.items, b.items))),
        agreement_table(choices, a),
    ]


@pytest.mark.parametrize("count", [3, 20])
@pytest.mark.parametrize("width", [80, 100, 140])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_names_and_numbers_stay_whole(count: int, width: int, which: int) -> None:
    found = lines(tables(count)[which], width)
    assert max(map(len, found)) <= width
    text = "\n".join(found)
    for name in (*LABELS, "unifiedreward.alignment"):
        assert re.search(rf"^{re.escape(name)} ", text, re.MULTILINE), name
    assert not re.search(r"\d…", text)
    if which == 0:
        assert text.count(f"-{count - 1}.png") == text.count("-0.png") == 4  # best and worst of each
    else:
        assert ("too few" in text) == (count < 9)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("jpeg_compressibility", ["jpeg_compressibility"]),
        ("unifiedreward.alignment", ["unifiedreward.alignment"]),
        ("step-100: unifiedreward.alignment", ["step-100: unifiedreward.", "alignment"]),
        ("a_label_that_somebody_gave_to_a_reward", ["a_label_that_somebody_", "gave_to_a_reward"]),
        ("x" * 60, ["x" * 26, "x" * 26, "x" * 8]),
        ("[red]markup", ["[red]markup"]),
    ],
)
def test_a_very_long_name_breaks_and_numbers_stay_whole(name: str, shown: list[str]) -> None:
    assert name_cell(name).plain.split("\n") == shown
    scores = made([-1.25, 2.5], ["p", "q"])
    scores.columns = {name: (name,)}
    for row in scores.rows:
        row |= {name: row["r"], f"{name}.reason": ""}
    text = "\n".join(found := lines(summary_table(summarise(scores), "2 images")))
    assert "0.6250" in text and "1.8750" in text and max(map(len, found)) <= 80


def test_what_is_not_there_is_a_dash_or_no_row() -> None:
    scores = made([math.nan, math.nan], ["p", "q"])
    assert "nan" not in "".join(lines(summary_table(summarise(scores), "2 images")))
    text = "\n".join(lines(agreement_table([Choice(0, 1, 1, "p")], scores)))
    assert "nan" not in text and "–" in text


@pytest.mark.parametrize(
    ("text", "width", "shown"),
    [("abc", 3, "abc"), ("abcdef", 4, "…def"), ("größe 大大.png", 8, "…大.png"), ("x", 1, "x")],
)
def test_names_keep_their_end(text: str, width: int, shown: str) -> None:
    assert shortened(text, width) == shown


def test_the_written_list_of_rewards_is_that_of_the_classes() -> None:
    assert WRITTEN.read_text(encoding="utf-8") == written(), "run `make docs`"


def test_rewards_are_listed_without_torch() -> None:
    code = "import sys; from diffalign.stages.rewards import show_rewards; show_rewards(); show_rewards(['hpsv2'])"
    heavy = "{'torch', 'numpy', 'transformers', 'pyarrow', 'PIL'} & set(sys.modules)"
    line = [sys.executable, "-c", f"{code}; assert not {heavy}, {heavy}"]
    done = subprocess.run(line, capture_output=True, text=True, env=environment())
    assert done.returncode == 0 and "xswu/HPSv2" in done.stdout, done.stderr


@pytest.mark.parametrize("width", [80, 120])
def test_the_list_of_rewards_can_be_read_and_copied(width: int) -> None:
    shown, problems = rewards_table()
    found = lines(shown, width)
    text = "\n".join(found)
    assert not problems and max(map(len, found)) <= width
    for name, kind in REWARDS.items():
        assert re.search(rf"^{name}  ", text, re.MULTILINE)
        for word in (*kind.weights.replace(",", " ").split(), *kind.licence.split(), *kind.requires):
            assert word in text or word == "none", word
    assert "diffalign[ocr]" in text and "inf" not in text
    # A number stands in one line with its unit.
    assert not [line for line in found if re.match(r"\s*(GB|MB)\b", line)]


@pytest.mark.parametrize("names", [["geneval"], ["hpsv2", "ocr"], ["helpers.counting_reward:Counting"], ["sharpness"]])
def test_one_reward_has_its_columns_and_options(names: list[str]) -> None:
    shown, _ = rewards_table(names)
    text = "\n".join(lines(shown))
    for name in names:
        kind = find_reward(name)
        assert name in text and all(option in text for option in accepted(name))
        assert all(column in text for column in kind.columns[1:])


def test_an_unknown_reward_is_refused() -> None:
    with pytest.raises(DiffalignError, match="did you mean 'hpsv3'"):
        rewards_table(["hpsv9"])


@pytest.mark.parametrize("width", [80, 120])
def test_no_word_is_cut(width: int) -> None:
    """Addresses break at their slashes; a word that is cut cannot be searched for."""
    listed = [part for name in REWARDS for part in (name, *find_reward(name).weights.split()) if part != "none"]
    for table, words in ((suites_table(), [s.where for s in SUITES.values()]), (rewards_table()[0], listed)):
        shown = lines(table, width)
        assert max(map(len, shown)) <= width
        for part in (part for text in words for part in re.split(r"(?<=/)|\s", text) if part):
            assert any(part in line for line in shown), part
