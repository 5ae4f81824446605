"""GenEval's decisions against cases computed by hand from the official evaluator and the Flow-GRPO reward server."""

from typing import Any

import pytest
import torch
from PIL import Image

from diffalign.errors import DiffalignError
from diffalign.rewards import REWARDS, Detection, GenEvalReward, load_reward
from diffalign.rewards.geneval import GenEvalSettings, decide, relations

RELATIONS = [
    ((300, 100, 400, 200), (100, 100, 200, 200), {"right of"}),
    ((100, 100, 200, 200), (120, 100, 220, 200), set()),
    ((121, 100, 221, 200), (100, 100, 200, 200), set()),
    ((300, 300, 400, 400), (100, 100, 200, 200), {"right of", "below"}),
    ((260, 130, 360, 230), (100, 100, 200, 200), {"right of"}),
    ((100, 60, 200, 160), (100, 100, 200, 200), set()),  # exactly -0.5: strict
    ((0, 0, 400, 400), (250, 150, 350, 250), set()),
    ((230, 230, 330, 330), (200, 100, 300, 200), {"below"}),
]


@pytest.mark.parametrize(("a", "b", "expected"), RELATIONS)
def test_relations(a: tuple, b: tuple, expected: set[str]) -> None:
    assert relations(a, b) == expected


def found(
    label: str, score: float, x: float = 0, y: float = 0, w: float = 100, h: float = 100, color: str | None = None
) -> Detection:
    return Detection(label, (x, y, x + w, y + h), score, color)


def wanted(label: str, count: int = 1, **attributes: Any) -> dict[str, Any]:
    return {"class": label, "count": count, **attributes}


BENCH = {"tag": "single_object", "include": [wanted("bench")]}
CLOCKS = {"tag": "counting", "include": [wanted("clock", 3)], "exclude": [wanted("clock", 4)]}
CAR = {"tag": "colors", "include": [wanted("car", color="blue")]}
DOG = {"tag": "position", "include": [wanted("teddy"), wanted("dog", position=["right of", 0])]}
FRUIT = {"tag": "color_attr", "include": [wanted("glass", color="purple"), wanted("apple", color="black")]}
TWO = {"tag": "two_object", "include": [wanted("cat"), wanted("bus")]}
TEDDY, RIGHT_DOG = found("teddy", 0.9, 100, 100), found("dog", 0.9, 300, 100)

# name, metadata, detections, official, exact, server, dense
CASES: list[tuple[str, dict[str, Any], list[Detection], bool, bool, float, float]] = [
    ("G1", BENCH, [found("bench", 0.95)], True, True, 1.0, 1.0),
    ("G2 extra objects", BENCH, [found("bench", s) for s in (0.95, 0.6, 0.31)], True, False, -1.0, 0.0),
    ("G3 at the threshold", BENCH, [found("bench", 0.30)], False, False, 0.0, 0.0),
    ("G4", CLOCKS, [found("clock", s) for s in (0.99, 0.95, 0.91, 0.85)], True, True, 1.0, 1.0),
    ("G5 one too many", CLOCKS, [found("clock", s) for s in (0.99, 0.95, 0.91, 0.92)], False, False, 2 / 3, 2 / 3),
    ("G6 one too few", CLOCKS, [found("clock", s) for s in (0.99, 0.95)], False, False, 2 / 3, 2 / 3),
    ("G7 second is blue", CAR, [found("car", 0.9, color="red"), found("car", 0.8, color="blue")], False, False, 0.0, 0.0),
    ("G8", DOG, [TEDDY, RIGHT_DOG], True, True, 1.0, 1.0),
    ("G9 swapped", DOG, [found("teddy", 0.9, 300, 100), found("dog", 0.9, 100, 100)], False, False, 0.75, 2 / 3),
    ("G10 target missing", DOG, [RIGHT_DOG], False, False, 1 / 3, 1 / 3),
    ("G11 second dog", DOG, [TEDDY, RIGHT_DOG, found("dog", 0.5, 0, 100, 50)], True, False, 1 / 3, 1 / 3),
    ("G12", FRUIT, [found("glass", 0.9, color="purple"), found("apple", 0.9, color="black")], True, True, 1.0, 1.0),
    ("G13 swapped", FRUIT, [found("glass", 0.9, color="black"), found("apple", 0.9, color="purple")], False, False, 0.5, 0.5),
    ("G14 one missing", FRUIT, [found("glass", 0.9, color="purple")], False, False, 0.5, 0.5),
    ("G15 nothing", TWO, [], False, False, 0.0, 0.0),
]  # fmt: skip


@pytest.mark.parametrize(("name", "metadata", "detections", "official", "exact", "server", "dense"), CASES)
def test_decisions(
    name: str, metadata: dict, detections: list, official: bool, exact: bool, server: float, dense: float
) -> None:
    decision = decide(detections, metadata)
    assert (decision.official, decision.exact) == (official, exact), decision.reason
    assert decision.server == pytest.approx(server, abs=1e-6)
    assert decision.dense == pytest.approx(dense, abs=1e-6)
    assert bool(decision.reason) is not official
    # The order in which a detector lists its objects says nothing.
    assert decide(detections[::-1], metadata) == decision


@pytest.mark.parametrize("n", range(8))
def test_count_term(n: int) -> None:
    decision = decide([found("clock", 0.99)] * n, CLOCKS)
    assert decision.server == pytest.approx(1 - abs(n - 3) / 3)
    assert decision.dense == pytest.approx(max(0.0, 1 - abs(n - 3) / 3))


def test_settings_are_the_detectors() -> None:
    faint = [found("clock", 0.5)] * 3
    assert not decide(faint, CLOCKS).official
    assert decide(faint, CLOCKS, GenEvalSettings(counting_threshold=0.3)).official
    assert decide([found("bench", 0.9)] * 40, CLOCKS | {"include": [wanted("bench", 16)], "exclude": []},
                  GenEvalSettings(counting_threshold=0.3)).exact  # fmt: skip


class Listed:
    """A detector that answers from a list."""

    labels = ("bench",)
    colors = ()

    def __init__(self, answers: list[list[Detection]]) -> None:
        self.answers = answers

    def detect(self, images: list[Image.Image]) -> list[list[Detection]]:
        return self.answers[: len(images)]


def test_reward_columns_and_a_broken_image(tmp_path) -> None:
    Image.new("RGB", (64, 64), (9, 9, 9)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    images = [Image.open(tmp_path / "b.png"), Image.open(tmp_path / "a.png")]
    reward = load_reward("geneval", detector=Listed([[found("bench", 0.9)]]))
    measured = reward.measure(images, ["a bench"] * 2, [BENCH] * 2)
    assert tuple(measured) == reward.columns and reward.columns[0] == "dense"
    assert measured["dense"].dtype == torch.float32
    assert torch.isnan(measured["dense"][0]) and measured["dense"][1] == 1.0
    assert "unreadable" in reward.reasons[0] and reward.reasons[1] == ""
    assert torch.equal(reward.score(images[1:], ["a bench"], [BENCH]), torch.ones(1))


def test_mistakes_are_named() -> None:
    with pytest.raises(DiffalignError, match="did you mean 'geneval'"):
        load_reward("genevel")
    with pytest.raises(DiffalignError, match="unknown option 'treshold'; did you mean 'threshold'"):
        load_reward("geneval", detector=Listed([]), treshold=0.2)
    with pytest.raises(DiffalignError, match="'a bench' has no GenEval metadata"):
        GenEvalReward(Listed([])).score([Image.new("RGB", (8, 8))], ["a bench"])


@pytest.mark.parametrize("name", REWARDS)
def test_every_reward_says_what_it_is(name: str) -> None:
    kind = REWARDS[name]
    assert kind.name == name
    assert kind.columns
    assert kind.licence
    assert kind.weights
    assert len(kind.range) == 2
