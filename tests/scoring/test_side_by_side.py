"""`score A --against B`: the page of pairs, and what the terminal says of them."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from diffalign.scoring.compare_folders import outcomes, verdict_lines
from diffalign.scoring.items import FileOrigin, Item
from diffalign.scoring.pairing import pair_up
from diffalign.scoring.run import Scores
from diffalign.scoring.side_by_side import write_side_by_side
from helpers import pictures
from helpers.command_line import run
from helpers.page import Tags
from helpers.scored_items import made

EVIL = '<script>alert("x")</script> "a\' onerror=alert(1)'


def shown(tmp_path: Path, a: list[float], b: list[float], prompts: list[str | None], most: int = 200) -> Tags:
    sides = made(a, prompts), made(b, prompts, side="b")
    write_side_by_side(
        tmp_path / "p.html", *sides, pair_up(*(side.items for side in sides)), ("A folder", "B folder"), most
    )
    return Tags((tmp_path / "p.html").read_text())


def cards(page: Tags) -> list[list[list[float | None]]]:
    return [json.loads(a["data-scores"] or "") for name, a in page.tags if name == "figure"]


def test_text_stays_text_and_nothing_is_fetched(tmp_path: Path) -> None:
    Image.new("RGB", (900, 600), (200, 30, 30)).save(tmp_path / "<img src=x onerror=alert(2)>.png")
    file = tmp_path / "<img src=x onerror=alert(2)>.png"
    sides = [
        Scores(
            [{"image": f"{side}/{EVIL}", "reason": "", "r": math.nan, "r.reason": EVIL}],
            {"r": ("r",)},
            items=[Item(f"{side}/{EVIL}", EVIL, FileOrigin(file), EVIL)],
        )
        for side in "ab"
    ]
    write_side_by_side(tmp_path / "p.html", *sides, pair_up(*(side.items for side in sides)), (EVIL, EVIL))
    html = (tmp_path / "p.html").read_text()
    page = Tags(html)
    names = [name for name, _ in page.tags]
    assert names.count("script") == 1 and not set(names) & {"link", "iframe", "object", "embed", "base"}
    assert EVIL not in page.scripts[0] and page.text.count(EVIL) >= 6  # folders, prompt, files, reason
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "action", "data"):
            assert (attributes.get(name) or "data:image/").startswith("data:image/")
    assert not re.search(r"url\(|@import|https?://", html)
    policy = next(a["content"] for _, a in page.tags if "http-equiv" in a)
    assert policy is not None and "default-src 'none'" in policy


@pytest.mark.parametrize(
    ("count", "shift", "verdict", "winner"),
    [
        (3, 1.0, "Too few prompts to tell", ""),
        (7, -1.0, "Too few prompts to tell", ""),
        (8, 1.0, "B wins", "won-b"),
        (20, -1.0, "A wins", "won-a"),
        (20, 0.0, "No difference seen", ""),
    ],
)
def test_who_wins_stands_on_top(tmp_path: Path, count: int, shift: float, verdict: str, winner: str) -> None:
    values, prompts = [float(i) for i in range(count)], [f"p{i}" for i in range(count)]
    page = shown(tmp_path, values, [v + shift for v in values], [*prompts])
    top = page.text.split("Pairs")[0]
    for words in (verdict, "A folder", f"{count} pairs by name, {count} prompts"):
        assert words in top
    tally = next(a["aria-label"] for _, a in page.tags if a.get("class") == "tally")
    a_wins, b_wins = count * (shift < 0), count * (shift > 0)
    assert tally == f"A wins {a_wins}, B wins {b_wins}, {count - a_wins - b_wins} ties"
    assert ("too few prompts" in top and "95%" not in top.split("Intervals are")[0]) == (count < 8)
    assert next(a.get("class") or "" for name, a in page.tags if name == "h2") == winner


def test_pairs_stand_by_the_size_of_their_difference(tmp_path: Path) -> None:
    """A pair without both scores comes last, and says why."""
    page = shown(tmp_path, [1.0, 2.0, math.nan, 4.0], [1.5, 2.0, 9.0, 1.0], ["p", "q", "r", None])
    assert cards(page) == [[[4.0, 1.0]], [[1.0, 1.5]], [[2.0, 2.0]], [[None, 9.0]]]
    halves = [a["class"] for _, a in page.tags if (a.get("class") or "").startswith("half")]
    assert halves == ["half a wins", "half b", "half a", "half b wins", "half a", "half b", "half a", "half b"]
    assert "no prompt" in page.text and "3 prompts" not in page.text.split("Pairs")[1]


def test_of_many_pairs_the_largest_of_both_sides_are_shown(tmp_path: Path) -> None:
    count = 50
    differences = [float(i - 25) for i in range(count)]
    page = shown(tmp_path, [0.0] * count, differences, [f"p{i}" for i in range(count)], most=9)
    drawn = [pair[0][1] for pair in cards(page)]
    assert len(drawn) == 9 and {-25.0, 24.0} <= set(drawn) and "9 of 50 pairs" in page.text
    assert "50 pairs by name" in page.text  # the counts on top are of all


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        ([0.0] * 10, [0.1] * 8 + [-0.01] * 2, "r: B wins (A wins 2, B wins 8, 0 ties; 10 prompts)"),
        ([0.0] * 10, [0.0] * 10, "r: no difference seen (A wins 0, B wins 0, 10 ties; 10 prompts)"),
        ([0.0] * 2, [1.0, 0.0], "r: too few prompts to tell (A wins 0, B wins 1, 1 tie; 2 prompts)"),
        ([math.nan] * 3, [1.0] * 3, "r: no pair has both scores"),
        (
            [0.0] * 24,
            [-0.01] * 20 + [9.0] * 4,
            "r: undecided: B scores higher on average, but A wins more often (A wins 20, B wins 4, 0 ties; 24 prompts)",
        ),
    ],
)
def test_the_verdict_counts_ties_and_claims_no_more_than_the_interval(
    a: list[float], b: list[float], words: str
) -> None:
    prompts: list[str | None] = [f"p{i}" for i in range(len(a))]
    sides = made(a, prompts), made(b, prompts, side="b")
    assert verdict_lines(outcomes(*sides, pair_up(*(side.items for side in sides)))) == [words]


def test_the_command_writes_the_page_and_no_table_of_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = (pictures.folder(tmp_path / side, 4, ["p", "q"]) for side in "ab")
    command = ("score", a, "--against", b, "--html", tmp_path / "p.html")
    assert run(*command, "-r", "sharpness", "-r", "ocr") == 3
    said = capsys.readouterr()
    assert "sharpness: too few prompts to tell (A wins 0, B wins 0, 4 ties; 2 prompts)" in said.out
    assert "ocr: no pair has both scores" in said.out and "nan" not in said.out and "ocr.exact" not in said.out
    assert said.err.count("no text in straight double quotes") == 1 and "8 x ocr: no text" in said.err
    page = Tags((tmp_path / "p.html").read_text())
    assert len(cards(page)) == 4 and len([1 for name, _ in page.tags if name == "img"]) == 8
    assert run(*command, "-r", "ocr") == 3
    said = capsys.readouterr()
    assert "4 images, none has a score" in said.out and "reward" not in said.out


@pytest.mark.parametrize("rewards", [["pickscore"], ["hpsv2", "ocr"], ["geneval"], ["imagereward", "clipscore"]])
def test_without_prompts_no_weights_are_looked_for(
    tmp_path: Path, rewards: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffalign.rewards.published_weights.fetch", lambda *a, **k: pytest.fail("looked for weights"))
    pictures.folder(tmp_path / "in", 3)
    (tmp_path / "in" / "metadata.jsonl").unlink()
    options = [word for name in rewards for word in ("-r", name)]
    assert run("score", tmp_path / "in", *options) == 2
    assert "no image has a prompt" in capsys.readouterr().err
    # Beside a reward that needs no prompt, each is one line, and the other scores.
    assert run("score", tmp_path / "in", *options, "-r", "sharpness") == 3
    said = capsys.readouterr()
    assert all(f"3 x {name}: no prompt" in said.err for name in rewards) and "sharpness" in said.out


@pytest.mark.parametrize(
    ("ours", "theirs", "how", "pairs"),
    [
        (["x/0.png", "x/1.png"], ["x/1.png", "x/0.png"], "name", [(0, 1), (1, 0)]),
        (["0.png", "1.png"], ["0.jpg", "1.webp"], "name", [(0, 0), (1, 1)]),
        (["samples/0.png", "samples/1.png"], ["0.png", "1.png"], "name", [(0, 0), (1, 1)]),
        # Two folders on each side: the names come twice, and no image is paired twice.
        (["0.png", "0.png"], ["0.png", "0.png"], "name", [(0, 0), (1, 1)]),
        # One name, two images on one side: the names do not tell, but the prompts do.
        (["0.png", "0.png"], ["0.png"], "prompt", [(0, 0)]),
        (["cat/0.png", "dog/0.png"], ["0.png"], "prompt", [(0, 0)]),
        # Some names agree, the rest is told by prompts.
        (["0.png", "1.png", "2.png"], ["0.png", "c.png", "b.png"], "name or prompt", [(0, 0), (1, 1), (2, 2)]),
        (["v1.0/a", "v1.1/b"], ["v1.1/b", "v1.0/a"], "name", [(0, 1), (1, 0)]),
    ],
)
def test_names_and_prompts_pair_each_image_once(
    ours: list[str], theirs: list[str], how: str, pairs: list[tuple[int, int]]
) -> None:
    in_order: list[str | None] = [f"p{i}" for i in range(3)]
    prompts = in_order if how != "name" else [None] * 3
    a = made([1.0] * len(ours), prompts[: len(ours)], ours)
    b = made([1.0] * len(theirs), prompts[: len(theirs)], theirs, "b")
    pairing = pair_up(a.items, b.items)
    assert pairing.how == how
    assert sorted(pair for group in pairing.prompts for pair in group) == pairs
    assert pairing.unpaired == len(ours) + len(theirs) - 2 * len(pairs)


def test_numbers_within_groups_of_datasets_tell_nothing() -> None:
    class InTable:
        def read(self) -> bytes:
            return b""

    a, b = made([1.0] * 2, ["p", "q"], ["g/0", "g/1"]), made([1.0] * 2, ["q", "p"], ["k/0", "k/1"], "b")
    for side in (a, b):
        side.items[:] = [replace(item, origin=InTable()) for item in side.items]
    pairing = pair_up(a.items, b.items)
    assert pairing.how == "prompt" and pairing.prompts == [[(0, 1)], [(1, 0)]]


@pytest.mark.parametrize("name", ["a", "labels.csv", "a/000.png", "page"])
def test_the_page_overwrites_nothing_else(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = pictures.folder(tmp_path / "a", 2), pictures.folder(tmp_path / "b", 2)
    (tmp_path / "labels.csv").write_text("mine")
    monkeypatch.setattr("diffalign.stages.score.score_items", lambda *a, **k: pytest.fail("scored"))
    assert run("score", a, "-r", "sharpness", "--against", b, "--html", tmp_path / name) == 2
    assert "name a file that ends in .html" in capsys.readouterr().err
    assert (tmp_path / "labels.csv").read_text() == "mine"
