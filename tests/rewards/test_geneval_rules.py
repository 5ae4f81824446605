"""GenEval's verdicts beside a second derivation of the evaluator and the reward server in numpy, on random scenes.

Nothing of diffalign.rewards.geneval is used in it: rules of evaluation/evaluate_images.py of djghosh13/geneval and of
reward_server/gen_eval.py of yifan123/reward-server, written from their text, on arrays [x1, y1, x2, y2].
"""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest

from diffalign.rewards import Detection
from diffalign.rewards.geneval import decide

NAMES, COLORS = ("cat", "dog", "cup"), ("red", "blue", "green")
DIRECTIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}


def stands(a: np.ndarray, b: np.ndarray, relation: str) -> bool:
    axis, sign = DIRECTIONS[relation]
    offset = (a[:2] + a[2:]) / 2 - (b[:2] + b[2:]) / 2
    sizes = (a[2:] - a[:2]) + (b[2:] - b[:2])
    free = np.sign(offset) * np.clip(np.abs(offset) - 0.1 * sizes, 0, None)
    return bool(np.abs(free).max() >= 1e-3 and sign * free[axis] / np.linalg.norm(offset) > 0.5)


def verdicts(scene: list[Detection], facts: dict[str, Any]) -> tuple[bool, bool, float]:
    """(official, exact, server): detections above the threshold count, compared in float32 as mmdet's arrays are, at most
    16 of a class.
    """
    by_class = {}
    for name in NAMES:
        ordered = sorted((d for d in scene if d.label == name), key=lambda d: -d.score)
        above = np.array([d.score for d in ordered], np.float32) > (0.9 if facts["tag"] == "counting" else 0.3)
        by_class[name] = [d for d, one in zip(ordered, above, strict=True) if one][:16]

    def together(first: list[Detection], second: list[Detection], relation: str) -> bool:
        return all(stands(np.array(a.box), np.array(b.box), relation) for a, b in itertools.product(first, second))

    answers, points = [], []
    for strict in (False, True):
        groups: list[list[Detection] | None] = []
        for clause in facts["include"]:
            n, seen = clause["count"], by_class[clause["class"]]
            used = seen if strict else seen[:n]
            color, place = clause.get("color"), clause.get("position")
            good = len(used) == n
            earned = [1 - abs(n - len(used)) / n]
            if not good:
                earned += [0.0] * (bool(color) or bool(place))
            if good and color:
                hits = [d.color for d in used].count(color)
                good = hits == n
                earned.append(1 - abs(n - hits) / n)
            if good and place:
                target = groups[place[1]]
                good = target is not None and together(used, target, place[0])
                earned += [1.0] if good else [0.0] if target is None else [0.0, 1.0]
            groups.append(used if good else None)
            points += earned if strict else []
        answers.append(None not in groups)
    refused = any(len(by_class[c["class"]]) >= c["count"] for c in facts.get("exclude", []))
    return answers[0] and not refused, answers[1], sum(points) / len(points)


def scores_near(threshold: float) -> list[float]:
    """The threshold as a double and in float32, the neighbours of the latter, and what is far away."""
    near = np.float32(threshold)
    around = [np.nextafter(near, np.float32(0)), near, np.nextafter(near, np.float32(1))]
    return [threshold, *map(float, around), threshold + 1e-9, threshold - 0.1, threshold + 0.05]


def scene_and_facts(draw: random.Random, edges: bool = False) -> tuple[list[Detection], dict[str, Any]]:
    include: list[dict[str, Any]] = []
    for k in range(draw.randint(1, 3)):
        clause: dict[str, Any] = {"class": draw.choice([NAMES[k]] * 4 + list(NAMES)), "count": draw.randint(1, 3)}
        if draw.random() < 0.4:
            clause["color"] = draw.choice(COLORS)
        if k and draw.random() < 0.6:
            clause["position"] = [draw.choice(list(DIRECTIONS)), draw.randrange(k)]
        include.append(clause)
    exclude = [{"class": draw.choice(NAMES), "count": draw.randint(1, 4)}] if draw.random() < 0.3 else []
    scene = []
    for name in NAMES:
        asked = [c for c in include if c["class"] == name]
        colors = [c["color"] for c in asked if "color" in c] or list(COLORS)
        for _ in range(max(0, max((c["count"] for c in asked), default=0) + draw.choice([0, 0, 0, 1, -1]))):
            x, y = (150 * draw.randrange(4) + draw.random() for _ in range(2))
            color = draw.choice(colors if draw.random() < 0.85 else COLORS)
            scene.append(Detection(name, (x, y, x + 60, y + 60), draw.uniform(0.31, 1), color))
    tag = draw.choice(["mixed", "counting"]) if edges else "mixed"
    if edges:
        near = scores_near(0.9 if tag == "counting" else 0.3)
        scene = [Detection(d.label, d.box, draw.choice(near), d.color) for d in scene]
        scene += [Detection(draw.choice(NAMES), (0, 0, 9, 9), draw.choice(near), "red")] * draw.choice([0, 0, 20])
    return scene, {"tag": tag, "include": include, "exclude": exclude}


@pytest.mark.parametrize("seed", range(4))
def test_random_scenes(seed: int) -> None:
    draw = random.Random(seed)
    right = 0
    for _ in range(1000):
        scene, facts = scene_and_facts(draw)
        found = decide(scene, facts)
        official, exact, server = verdicts(scene, facts)
        assert (found.official, found.exact) == (official, exact), (scene, facts)
        assert found.server == pytest.approx(server, abs=1e-12), (scene, facts)
        right += official
    assert right > 50


@pytest.mark.parametrize("seed", range(3))
def test_scores_at_the_threshold(seed: int) -> None:
    draw = random.Random(100 + seed)
    right = 0
    for _ in range(1000):
        scene, facts = scene_and_facts(draw, edges=True)
        found = decide(scene, facts)
        official, exact, server = verdicts(scene, facts)
        assert (found.official, found.exact) == (official, exact), (scene, facts)
        assert found.server == pytest.approx(server, abs=1e-12), (scene, facts)
        right += official
    assert right > 30


def box(name: str, y: float, x: float = 0, color: str | None = None) -> Detection:
    return Detection(name, (x, y, x + 100, y + 100), 0.9, color)


def clause(name: str, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": name, "count": count, **more}


CATS_ABOVE, BELOW = [box("cat", 0), box("cat", 0, 150)], {"position": ["below", 0]}


@pytest.mark.parametrize(
    ("include", "scene", "server"),
    [
        # Two cats where one is wanted: (0 + 1 + 0) / 3, though the dog is below both.
        ([clause("cat"), clause("dog", **BELOW)], [*CATS_ABOVE, box("dog", 400)], 1 / 3),
        # The target has the wrong colour: (1 + 0 + 1 + 0) / 4.
        ([clause("cat", color="red"), clause("dog", **BELOW)], [box("cat", 0, color="blue"), box("dog", 400)], 1 / 2),
        # The target is itself out of place: (1 + 1 + 0 + 1 + 1 + 0) / 6.
        (
            [clause("cup"), clause("cat", position=["below", 0]), clause("dog", position=["below", 1])],
            [box("cup", 400), box("cat", 0), box("dog", 800)],
            4 / 6,
        ),
        # One of two cats is missing: (1/2 + 1 + 0) / 3.
        ([clause("cat", 2), clause("dog", **BELOW)], [box("cat", 0), box("dog", 400)], 1 / 2),
        # The clause's own colour is wrong, so its place is not asked: (1 + 1 + 0) / 3.
        ([clause("cat"), clause("dog", color="red", **BELOW)], [box("cat", 0), box("dog", 400, color="blue")], 2 / 3),
        # All is right: 1.
        ([clause("cat", 2), clause("dog", **BELOW)], [*CATS_ABOVE, box("dog", 400)], 1.0),
    ],
)
def test_a_place_needs_a_right_target(include: list[dict[str, Any]], scene: list[Detection], server: float) -> None:
    facts = {"tag": "position", "include": include}
    assert decide(scene, facts).server == pytest.approx(server) == verdicts(scene, facts)[2]
