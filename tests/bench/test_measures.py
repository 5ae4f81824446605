"""Scores as means of means, against numpy and the published scripts' own loops written again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from scipy.stats import gmean

from diffalign.bench.measures import JudgedImage, Measure, difference
from diffalign.bench.suites import SUITES, find_suite
from diffalign.data.prompts import PromptRow
from diffalign.errors import DiffalignError

RNG = np.random.default_rng(0)


def formed(suite: str, images: Sequence[JudgedImage]) -> dict[str, float]:
    return {measure.name: measure.value() for measure in SUITES[suite].form(images)}


def answers(values: Sequence[float]) -> dict[str, float]:
    """What the judge `vqa` writes of an image, with one column more than questions."""
    found = {"vqa": float(np.mean(values)), "vqa.geometric": float(gmean(values))}
    return found | {f"vqa.answer@{k}": v for k, v in enumerate([*values, math.nan], start=1)}


def test_means_and_weights() -> None:
    values = [(0, "a", 1.0), (0, "a", 0.0), (1, "a", 1.0), (2, "b", 0.5), (3, "b", math.nan)]
    assert Measure.of("x", values).value() == pytest.approx((2 / 3 + 0.5) / 2)
    assert Measure.of("x", values, weights={"a": 3, "b": 1, "c": 9}).value() == pytest.approx((3 * 2 / 3 + 0.5) / 4)
    assert Measure.of("x", ((p, "", v) for p, _, v in values), scale=100).value() == pytest.approx(100 * 2.5 / 4)
    assert math.isnan(Measure.of("x", []).value()) and Measure.of("x", values).prompts == [0, 1, 2]


def test_the_interval_is_that_of_resampled_prompts() -> None:
    """100 prompts with 1 to 3 images: resampled by a loop that keeps the prompts' images together."""
    images = [(p, "ab"[p % 2], float(v)) for p in range(100) for v in RNG.random(1 + p % 3)]
    interval = Measure.of("x", images).interval()
    rng, found = np.random.default_rng(1), []
    by_prompt: dict[int, list[tuple[str, float]]] = {}
    for p, kind, v in images:
        by_prompt.setdefault(p, []).append((kind, v))
    for _ in range(3000):
        some = [pair for p in rng.integers(100, size=100) for pair in by_prompt[int(p)]]
        found.append(np.mean([np.mean([v for k, v in some if k == kind]) for kind in "ab"]))
    low, high = np.quantile(found, [0.025, 0.975])
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=0.006)
    assert Measure.of("x", [i for i in images if i[0] < 7]).interval().low is None


def test_a_difference_is_paired() -> None:
    """Two results that differ by a constant on every prompt: the interval is that constant, however far prompts spread."""
    values = RNG.random(20) * 10
    a = Measure.of("x", [(p, "", float(v)) for p, v in enumerate(values)])
    b = Measure.of("x", [(p, "", float(v) + 0.5) for p, v in enumerate(values)])
    change, interval = difference(a, b)
    assert change == pytest.approx(0.5) and (interval.low, interval.high) == pytest.approx((0.5, 0.5))
    assert interval.verdict() == "better" and difference(b, a)[0] == pytest.approx(-0.5)
    with pytest.raises(DiffalignError, match="share no judged prompt"):
        difference(a, Measure.of("x", [(99, "", 1.0)]))


def test_a_score_survives_its_file() -> None:
    measure = Measure.of("x", [(0, "a", 0.1), (9, "b", 0.3)], scale=100, digits=2, weights={"a": 0.4, "b": 0.6})
    assert Measure.from_dict("x", measure.as_dict()) == measure


def test_geneval() -> None:
    tags = ["single_object", "counting", "counting"]
    images = [
        JudgedImage(p, {"tag": tag}, {"geneval": 0.5, "geneval.official": float(RNG.random() > 0.5)})
        for p, tag in enumerate(tags)
        for _ in range(4)
    ]
    right = np.array([i.values["geneval.official"] for i in images]).reshape(3, 4)
    found = formed("geneval", images)
    assert found["overall"] == pytest.approx((right[0].mean() + right[1:].mean()) / 2)  # np.mean(task_scores)
    assert found["counting"] == pytest.approx(right[1:].mean()) and found["correct images"] == pytest.approx(
        right.mean()
    )
    assert found["correct prompts"] == pytest.approx((right.max(axis=1)).mean())


def test_geneval2() -> None:
    scores = [RNG.random(3) + 0.01, RNG.random(4) + 0.01]
    skills = [["count", "object", "attribute"], ["count", "verb", "object", "object"]]
    images = [JudgedImage(p, {"tag": str(3 + 7 * p), "skills": skills[p]}, answers(list(scores[p]))) for p in range(2)]
    found = formed("geneval2", images)
    assert found["Soft-TIFA GM"] == pytest.approx(100 * np.mean([gmean(s) for s in scores]))
    assert found["Soft-TIFA AM"] == pytest.approx(100 * np.mean([s.mean() for s in scores]))
    assert found["object"] == pytest.approx(100 * np.mean([scores[0][1], scores[1][2], scores[1][3]]))
    assert [name for name in found if name.startswith("atoms")] == ["atoms 3", "atoms 10"]
    assert found["atoms 10"] == pytest.approx(100 * gmean(scores[1]))


def published_dpg(ids: list[int], parents: list[list[int]], yes: list[bool]) -> float:
    """compute_dpg_bench.py's rule: in the file's order, a question is 0 if a parent of it is 0 by then."""
    by_id = dict(zip(ids, map(float, yes), strict=True))
    for number, above in zip(ids, parents, strict=True):
        for parent in above:
            if parent != 0 and by_id[parent] == 0:
                by_id[number] = 0.0
    return float(np.mean(list(by_id.values())))


def test_dpgbench() -> None:
    images, expected, flat = [], [], []
    for p in range(30):
        ids = list(range(1, 6))
        parents = [[0], [1], [2, 1], [0], [int(RNG.integers(1, 5))]]
        chances = RNG.random(5)
        facts = {"proposition_ids": ids, "dependencies": parents, "categories": ["entity - whole", "attribute - color"] * 2
                 + ["relation - spatial"]}  # fmt: skip
        images.append(JudgedImage(p, facts, answers(list(chances))))
        expected.append(published_dpg(ids, parents, list(chances > 0.5)))
        flat.append(chances > 0.5)
    found = formed("dpgbench", images)
    assert found["DPG-Bench"] == pytest.approx(100 * np.mean(expected))
    assert found["DPG-Bench"] < 100 * np.mean(flat)  # dependencies cost something
    assert found["entity"] == pytest.approx(100 * np.mean(np.array(flat)[:, [0, 2]]))
    assert found["relation"] == pytest.approx(100 * np.mean(np.array(flat)[:, 4]))


def test_hpsv2() -> None:
    """evaluation.py: the mean over ten parts of 80 of each style, times 100."""
    values = {style: RNG.random(800) * 0.1 + 0.2 for style in ("anime", "photo")}
    images = [
        JudgedImage(800 * s + k, {"tag": style}, {"hpsv2": float(v)})
        for s, (style, scores) in enumerate(values.items())
        for k, v in enumerate(scores)
    ]
    found = formed("hpsv2", images)
    parts = {s: np.mean([np.mean(v[i : i + 80]) * 100 for i in range(0, 800, 80)]) for s, v in values.items()}
    assert found == pytest.approx({"mean of styles": np.mean(list(parts.values())), **parts})


def test_the_others() -> None:
    points = ["Style", "Attribute - Color", "Attribute - Size"]
    unigen = [JudgedImage(p, {"testpoints": points}, answers([0.9, 0.1, 0.2 + 0.5 * p])) for p in range(2)]
    assert formed("unigenbench", unigen) == pytest.approx({
        "mean of dimensions": 100 * (1 + 0.25) / 2, "Style": 100, "Attribute": 25, "Attribute - Color": 0,
        "Attribute - Size": 50,
    })  # fmt: skip
    categories = ["Cultural knowledge", "time", "Space", "Biology", "Physical Knowledge", "Chemistry"]
    right = {c: float(k % 2) for k, c in enumerate(categories)}
    wise = [JudgedImage(k, {"tag": c}, answers([0.25 + 0.5 * right[c]])) for k, c in enumerate(categories)]
    assert formed("wise", wise)["WiScore"] == pytest.approx(0.4 * right[categories[0]] + 0.12 * sum(right.values()))
    bench = [
        JudgedImage(0, {"tag": "color"}, {"vqascore": 0.5}),
        JudgedImage(1, {"tag": "non_spatial"}, {"clipscore": 0.3}),
    ]
    assert formed("t2i-compbench", bench) == pytest.approx({"color": 0.5, "non_spatial": 0.3})
    assert formed("pickapic", [JudgedImage(0, {}, {"pickscore": 21.5})]) == pytest.approx({"PickScore": 21.5})


@pytest.mark.parametrize("name", ["unigenbench", "wise"])
def test_questions(name: str) -> None:
    facts: dict[str, Any] = {
        "testpoints": ["Style"],
        "descriptions": ["ink {painting}"],
        "explanation": "A mooncake.",
        "tag": "x",
    }
    (row,) = SUITES[name].prepare([PromptRow("a {round} pastry", facts)])
    ((question, answer),) = row.metadata["questions"]
    assert "a {round} pastry" in question and answer == "Yes"
    assert ("ink {painting}" if name == "unigenbench" else "A mooncake. ") in question


def test_names() -> None:
    assert find_suite("dpg").name == "dpgbench"
    with pytest.raises(DiffalignError, match="--task genevl: unknown suite; did you mean geneval"):
        find_suite("genevl")
    for name, suite in SUITES.items():
        assert suite.name == name and suite.source and suite.where and suite.published > 0 and suite.judges
