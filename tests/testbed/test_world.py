"""The embedded world: what it draws can be read back, and what is held out is held out."""

import itertools

import numpy as np
import pytest
from PIL import Image, ImageFilter

from diffalign.errors import DiffalignError
from diffalign.rewards.geneval import GenEvalReward
from diffalign.testbed.detector import ShapeDetector
from diffalign.testbed.scenes import COLORS, GROUND, SHAPES, PlacedShape, render
from diffalign.testbed.shape_prompts import (
    RELATIONS,
    SPLITS,
    TAGS,
    combinations,
    combinations_of,
    draw_prompts,
    misdescribed,
    prompt_text,
    scene_for,
)


def read_back(image: Image.Image) -> list[tuple[str, str | None]]:
    return sorted((d.label, d.color) for d in ShapeDetector().detect([image])[0] if d.score > 0.3)


def test_detector_reads_ground_truth() -> None:
    rng = np.random.default_rng(0)
    scenes = [scene_for(m, rng) for m in draw_prompts("train", 600)]
    exact = [read_back(render(s)) == sorted((i.shape, i.color) for i in s) for s in scenes]
    assert np.mean(exact) >= 0.99


def test_detector_finds_places() -> None:
    scene = (PlacedShape("square", "blue", 20.0, 22.0, 9.0), PlacedShape("ring", "red", 44.0, 40.0, 8.0))
    found = {d.label: d.box for d in ShapeDetector().detect([render(scene)])[0]}
    assert found["square"] == pytest.approx((11, 13, 29, 31), abs=0.8)
    assert found["ring"] == pytest.approx((36, 32, 52, 48), abs=0.8)


def test_detector_confidence_falls_with_damage() -> None:
    sharp = render((PlacedShape("cross", "green", 32.0, 32.0, 10.0),))
    scores = []
    for radius in (0, 1.2, 2.4):
        found = ShapeDetector().detect([sharp.filter(ImageFilter.GaussianBlur(radius))])[0]
        scores.append(max((d.score for d in found if d.label == "cross"), default=0.0))
    assert scores[0] == 1.0 and scores[0] > scores[1] > scores[2]


def test_empty_ground_holds_nothing() -> None:
    assert read_back(Image.new("RGB", (64, 64), GROUND)) == []


@pytest.mark.parametrize("tag", TAGS)
def test_true_scenes_score_one(tag: str) -> None:
    """Renderer, detector and GenEval's decisions agree on what each kind of prompt asks for."""
    rng = np.random.default_rng(1)
    wanted = [c[0] for c in combinations(tag)][:40]
    images = [render(scene_for(m, rng)) for m in wanted]
    measured = GenEvalReward(detector=ShapeDetector()).measure(images, [m["prompt"] for m in wanted], wanted)
    for column in ("dense", "official", "exact"):
        assert measured[column].mean() >= 0.97, column


def test_scenes_of_other_prompts_score_less() -> None:
    rng = np.random.default_rng(2)
    wanted = draw_prompts("train", 120)
    images = [render(scene_for(m, rng)) for m in wanted[7:] + wanted[:7]]
    measured = GenEvalReward(detector=ShapeDetector()).measure(images, [m["prompt"] for m in wanted], wanted)
    assert measured["exact"].mean() < 0.1


def combination_key(metadata: dict) -> tuple:
    """What a prompt asks for, whatever its wording."""
    include = metadata["include"]
    objects = [(c["class"], c["count"], c.get("color")) for c in include]
    if "position" not in include[-1]:
        return (frozenset(objects),)
    relation = include[-1]["position"][0]
    pair = (objects[1], relation, objects[0])
    return min(pair, (objects[0], RELATIONS[relation], objects[1]), key=str)


def test_splits_share_neither_prompt_nor_combination() -> None:
    seen = {split: [w for tag in TAGS for c in combinations_of(split, tag) for w in c] for split in SPLITS}
    for a, b in itertools.combinations(SPLITS, 2):
        assert not {m["prompt"] for m in seen[a]} & {m["prompt"] for m in seen[b]}
        assert not {combination_key(m) for m in seen[a]} & {combination_key(m) for m in seen[b]}
    total = sum(len(combinations(tag)) for tag in TAGS)
    assert sum(len({combination_key(m) for m in ms}) for ms in seen.values()) == total


def test_prompts_are_distinct_and_repeatable() -> None:
    test = draw_prompts("test", 256)
    assert len({m["prompt"] for m in test}) == 256 and {m["tag"] for m in test} == set(TAGS)
    assert test == draw_prompts("test", 256) and test != draw_prompts("test", 256, seed=1)
    with pytest.raises(DiffalignError, match="has .* prompts; 100000 were asked for"):
        draw_prompts("test", 100_000)
    with pytest.raises(DiffalignError, match="use one of test, validation, train"):
        draw_prompts("tset", 1)


def test_wordings() -> None:
    assert {"a circle", "a red circle", "two circles", "three red crosses", "a circle and a square"} <= {
        w["prompt"] for tag in TAGS for c in combinations(tag) for w in c
    }
    clauses = [{"class": "ring", "count": 1}, {"class": "star", "count": 1, "position": ["left of", 0]}]
    assert prompt_text(clauses) == "a star left of a ring"


def test_misdescribed_replaces_the_stated_share() -> None:
    rng = np.random.default_rng(3)
    wanted = [m for m in draw_prompts("train", 400) if m["tag"] == "colors"] * 100
    assert all(misdescribed(m, rng, 0.0) == m["prompt"] for m in wanted[:50])
    colors = [misdescribed(m, rng, 0.35).split()[1] == m["prompt"].split()[1] for m in wanted]
    # A replaced colour is the old one again once in seven.
    assert np.mean(colors) == pytest.approx(1 - 0.35 * (1 - 1 / len(COLORS)), abs=0.03)
    assert len(SHAPES) == 6


def test_prompts_are_the_callers_own() -> None:
    rows = draw_prompts("test", 4)
    rows[0]["include"][0]["class"] = "changed"
    assert draw_prompts("test", 4)[0]["include"][0]["class"] != "changed"
