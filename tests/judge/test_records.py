"""Records about rated images: what is read, what is refused, and the embedded world's, whose truth is known."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffalign.errors import DiffalignError
from diffalign.judge.records import Rated, rated_images, read_pairs, read_ratings, read_taught
from diffalign.stages.judge import judge_data
from diffalign.testbed.detector import ShapeDetector
from diffalign.testbed.judge_data import DIMENSIONS, LEVELS, faulty_image
from diffalign.testbed.shape_prompts import draw_prompts

PAIR = {
    "prompt": "a red circle",
    "dimension": "alignment",
    "image_w": "a.png",
    "image_l": "b.png",
    "score_w": 4.5,
    "score_l": 2,
}
TAUGHT = {"prompt": "p", "dimension": "realism", "image": "a.png", "probabilities": [0.0] * 8 + [1.0], "teacher": "t"}


def written(folder: Path, *rows: Any) -> Path:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(folder / name)
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_pairs_are_read(tmp_path: Path) -> None:
    (one, two) = read_pairs(written(tmp_path, PAIR, PAIR | {"trace_w": "fine .", "trace_l": "blue .", "more": 1}))
    assert one.scores == (4.5, 2.0) and one.images == (tmp_path / "a.png", tmp_path / "b.png") and one.traces is None
    assert two.traces == ("fine .", "blue .")
    assert [r.ratings for r in rated_images([one, two])] == [(4.5,), (2.0,)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": ""}, "records.jsonl:1: prompt should be a text"),
        ({"score_w": 4.25}, "score_w 4.25 is none of the levels"),
        ({"score_w": True}, "score_w should be a number, not True"),
        ({"score_l": 5}, "score_w 4.5 should be above score_l 5; swap"),
        ({"image_l": "../b.png"}, "image_l ../b.png lies outside"),
        ({"image_l": "/etc/passwd"}, "lies outside"),
        ({"image_w": "c.png"}, "image_w c.png is not in"),
        ({"trace_w": "only one"}, "trace_l is missing"),
    ],
)
def test_bad_pairs_are_refused_with_their_place(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(DiffalignError, match=message):
        read_pairs(written(tmp_path, PAIR | change))


def test_other_bad_records_are_refused(tmp_path: Path) -> None:
    without = {k: v for k, v in PAIR.items() if k != "dimension"}
    cases: tuple[tuple[Callable[[Path], Any], Any, str], ...] = (
        (read_pairs, without, ":1: dimension is missing"),
        (read_pairs, [1], "an object is expected"),
        (read_taught, TAUGHT | {"probabilities": [1.0] * 9}, "sum to 1"),
        (read_taught, TAUGHT | {"probabilities": [1.0]}, "9 numbers"),
        (read_ratings, TAUGHT | {"ratings": []}, "one at least"),
        (read_ratings, TAUGHT | {"ratings": [6]}, "from 1 to 5"),
        (read_ratings, TAUGHT | {"ratings": "5"}, "a list of numbers"),
    )
    for reader, row, message in cases:
        with pytest.raises(DiffalignError, match=message):
            reader(written(tmp_path, row))
    with pytest.raises(DiffalignError, match="holds no record"):
        read_pairs(written(tmp_path))
    assert read_taught(written(tmp_path, TAUGHT))[0].probabilities[-1] == 1


def test_the_test_score_drops_the_extremes() -> None:
    assert Rated("p", "d", Path(), (1.0, 4.0, 4.5, 5.0)).score == 4.25
    assert Rated("p", "d", Path(), (1.0, 4.0)).score == 2.5


def test_the_world_makes_records_whose_truth_is_known(tmp_path: Path) -> None:
    judge_data(tmp_path / "data", "test", 30, 4, 5, seed=1)
    rated, pairs = read_ratings(tmp_path / "data/ratings.jsonl"), read_pairs(tmp_path / "data/pairs.jsonl")
    assert len(rated) == 120 and 40 < len(pairs) <= 60
    assert {r.dimension for r in rated} == set(DIMENSIONS)
    assert all(pair.traces for pair in pairs)
    rows = [json.loads(line) for line in (tmp_path / "data/ratings.jsonl").read_text().splitlines()]
    errors = np.array([np.mean(row["ratings"]) - np.dot(row["true_probabilities"], LEVELS) for row in rows])
    assert abs(errors.mean()) < 0.1 and 0.1 < errors.std() < 0.35  # five raters of spread 0.5
    before = (tmp_path / "data/pairs.jsonl").read_bytes()
    judge_data(tmp_path / "again", "test", 30, 4, 5, seed=1)
    assert (tmp_path / "again/pairs.jsonl").read_bytes() == before
    with pytest.raises(DiffalignError, match="holds other data"):
        judge_data(tmp_path / "data", "test", 30, 4, 5, seed=2)


def test_an_image_without_a_fault_shows_its_prompt_and_faults_cost_what_they_should() -> None:
    rng = np.random.default_rng(0)
    for metadata in draw_prompts("validation", 24):
        found = [faulty_image(metadata, "alignment", degree, rng) for degree in range(4)]
        assert found[0].score == 5.0 and found[0].reasons.endswith("all right .")
        assert all(one.score < 5 and "wrong" in one.reasons for one in found[1:])
        expected = {c["class"]: c["count"] for c in metadata["include"]}
        seen = [one.label for one in ShapeDetector().detect([found[0].image])[0]]
        assert {name: seen.count(name) for name in expected} == expected


@pytest.mark.parametrize("dimension", ["realism", "plausibility"])
def test_damage_grows_with_its_degree(dimension: str) -> None:
    metadata = draw_prompts("train", 6)[0]
    shown = []
    for degree in range(5):
        rng = np.random.default_rng(3)
        shown.append(np.asarray(faulty_image(metadata, dimension, degree, rng).image, float))
    away = [np.abs(image - shown[0]).mean() for image in shown]
    assert away[0] == 0 and away[1] > 0 and away[4] > away[1]


def test_records_that_are_not_there_are_named_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(DiffalignError, match=r"nowhere.jsonl: no such file; .* `diffalign testbed judge-data`"):
        read_pairs(tmp_path / "nowhere.jsonl")
