"""The OCR reward: decisions worked out by hand from Flow-GRPO's definition, and rendered text read for real."""

from __future__ import annotations

import builtins
import random
from functools import cache
from typing import Any

import pytest
import torch
from PIL import Image

from diffalign.errors import DiffalignError
from diffalign.rewards import load_reward
from diffalign.rewards.ocr import OCRReward, edit_distance, exact_match, similarity, target_of
from helpers import lettering

HELLO = "Hello World"
CASES = [
    (HELLO, ["Hello World"], 1.0, 1.0),
    (HELLO, ["HELLO", "WORLD"], 1.0, 1.0),
    (HELLO, ["WORLD", "HELLO"], 0.2, 0.0),  # the order of lines matters
    (HELLO, ["Helo World"], 0.9, 0.0),
    (HELLO, ["Hello Wrold"], 0.8, 0.0),
    (HELLO, ["xxHello Worldyy"], 1.0, 0.0),  # text around it costs nothing
    (HELLO, [], 0.0, 0.0),
    (HELLO, ["Completely different text here"], 0.0, 0.0),  # the distance is capped
    (HELLO, ["Hello"], 0.5, 0.0),
    (HELLO, ["Hell0 W0rld!"], 0.7, 0.0),
    (HELLO, ["say HELLO WORLD now"], 1.0, 0.0),
    (HELLO, ["Hello Wor1d 2024"], 0.5, 0.0),
    ("A", ["B"], 0.0, 0.0),
    ("cat", ["concatenate"], 1.0, 0.0),
    ("Straße", ["STRASSE"], 2 / 3, 0.0),
]


@pytest.mark.parametrize(("target", "lines", "expected", "exact"), CASES)
def test_decisions(target: str, lines: list[str], expected: float, exact: float) -> None:
    read = [(line, 0.9) for line in lines]
    assert similarity(target, read) == pytest.approx(expected)
    assert exact_match(target, read) == exact
    assert similarity(target, [*read, ("zzz", 0.0)]) == pytest.approx(expected)  # confidence 0 is not read


def test_confidence_zero_is_nothing() -> None:
    assert similarity(HELLO, [(HELLO, 0.0)]) == 0.0


def test_edit_distance_is_a_metric() -> None:
    words = ["", "a", "abc", "acb", "kitten", "sitting", "Saturday", "Sunday"]
    assert edit_distance("kitten", "sitting") == 3 and edit_distance("Saturday", "Sunday") == 3
    for a in words:
        assert edit_distance(a, "") == len(a) and edit_distance(a, a) == 0
        for b in words:
            assert edit_distance(a, b) == edit_distance(b, a)
            assert all(edit_distance(a, b) <= edit_distance(a, c) + edit_distance(c, b) for c in words)


def flow_grpos_reward(prompt: str, lines: list[tuple[str, float]]) -> float:
    """Flow-GRPO's OCR reward derived once more from the text of its flow_grpo/ocr.py, edit distance by its definition."""

    @cache
    def distance(i: int, j: int) -> int:
        if not (i and j):
            return i + j
        return min(
            distance(i - 1, j) + 1, distance(i, j - 1) + 1, distance(i - 1, j - 1) + (read[i - 1] != asked[j - 1])
        )

    asked = prompt.split('"')[1].replace(" ", "").lower()
    read = "".join(text * (confidence > 0) for text, confidence in lines).replace(" ", "").lower()
    return 1 - min(0 if asked in read else distance(len(read), len(asked)), len(asked)) / len(asked)


@pytest.mark.parametrize("seed", range(3))
def test_random_lines_are_scored_as_by_flow_grpo(seed: int) -> None:
    draw = random.Random(seed)
    letters = "abcABC 12äßÉéıİ中!'\t"
    partly = 0
    for _ in range(200):
        text = "".join(draw.choices(letters, k=draw.randint(1, 9))).strip() or "x"
        read = list(text)
        for _ in range(draw.randrange(4)):
            read.insert(draw.randrange(len(read) + 1), draw.choice(letters))
            del read[draw.randrange(len(read))]
        cut = draw.randrange(len(read) + 1)
        lines = [("".join(part), draw.choice([0.0, 0.4, 0.9, 0.9])) for part in (read[:cut], read[cut:])]
        prompt = f'a sign that says "{text}", at night'
        target = target_of(prompt)
        assert target is not None
        expected = flow_grpos_reward(prompt.replace(text, target), lines)
        assert similarity(target, lines) == pytest.approx(expected, abs=1e-12), (text, lines)
        partly += 0 < expected < 1
    assert partly > 40


def test_targets() -> None:
    assert target_of('New York with "Hello World" written') == "Hello World"
    assert target_of('"OPEN" beside "CLOSED"') == "OPEN"
    assert target_of("no quotes") is None and target_of('"  "') is None and target_of("“curly”") is None
    assert target_of('one " alone') is None
    # Quotes that hold nothing are no text, and a sign of two lines is one text.
    assert (
        target_of('"" and "OPEN"') == "OPEN" and target_of('" \n" or "A" or "B"') == "A" and target_of('"" ""') is None
    )
    for between in ("\n", "\r\n", "\n\n", "\t", "\u2028"):
        target = target_of(f'a sign "Hello{between}World"')
        assert target == HELLO
        assert similarity(target, [("HELLO", 0.9), ("WORLD", 0.9)]) == exact_match(target, [(HELLO, 0.9)]) == 1.0


@pytest.mark.parametrize("seed", range(3))
def test_targets_beside_flow_grpos(seed: int) -> None:
    """There the target is what stands between the first two quotes, or after the only one, blank or not. Here a blank text
    or one without an end is none, and blanks and line breaks in it are one space, which the score ignores.
    """
    draw = random.Random(seed)
    counted = {"same": 0, "blank": 0, "open": 0, "none": 0}
    for _ in range(1000):
        prompt = "".join(draw.choice(['"', '"', "a", "Bc", " ", "\n", "ß"]) for _ in range(draw.randint(1, 12)))
        parts, ours = prompt.split('"'), target_of(prompt)
        if len(parts) < 3:
            counted["none" if len(parts) == 1 else "open"] += 1
            assert ours is None
        elif parts[1].strip():
            counted["same"] += 1
            assert ours is not None and ours.split() == parts[1].split()
            read = [(parts[1].replace("\n", " "), 0.9)]
            assert similarity(ours, read) == exact_match(ours, read) == 1.0
        else:
            counted["blank"] += 1
            later = [text for text in parts[3:-1:2] if text.strip()]
            assert ours is None if not later else ours is not None and ours.split() == later[0].split()
    assert min(counted.values()) > 50


@pytest.mark.soak
def test_rendered_text_is_read(soak: bool) -> None:
    pictures = lettering.rendered(160 if soak else 16)
    reward = load_reward("ocr")
    prompts = [f'a sign that says "{text}"' for text, _ in pictures]
    measured = reward.measure([image for _, image in pictures], prompts)
    assert measured["exact"].mean() >= 0.95
    assert (measured["similarity"] >= measured["exact"]).all()
    shuffled = reward.measure([image for _, image in pictures[:4]], prompts[4:8])
    assert shuffled["exact"].max() == 0 and shuffled["similarity"].mean() < 0.6


def test_prompts_without_quotes(capsys: pytest.CaptureFixture[str]) -> None:
    blank = Image.new("RGB", (64, 64), (90, 90, 90))
    reward = load_reward("ocr")
    measured = reward.measure([blank, blank], ["a cat", 'a "cat"'])
    assert torch.isnan(measured["similarity"][0]) and "double quotes" in reward.reasons[0]
    assert measured["similarity"][1] == 0 and reward.reasons[1] == ""  # nothing was read
    with pytest.raises(DiffalignError, match=r"prompt 'a cat': no text in straight double quotes"):
        reward.score([blank], ["a cat"])


def test_without_rapidocr(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: Any, **named: Any) -> Any:
        if name == "rapidocr":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(DiffalignError, match=r"pip install 'diffalign\[ocr\]'"):
        OCRReward().score([Image.new("RGB", (64, 64))], ['a "cat"'])
