"""Judges that see several images at once: what they are shown, what an answer means, and the bias by place."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffalign.config.run import RewardSection
from diffalign.errors import DiffalignError
from diffalign.rewards import load_reward
from diffalign.rewards.group_judge import scores_in
from diffalign.rewards.groupwise import ImageGroup
from diffalign.rewards.unifiedreward_pairs import PairReward, UnifiedRewardFlex, UnifiedRewardThink
from diffalign.scoring.position_bias import position_bias
from diffalign.scoring.run import Scores
from diffalign.stages.resolve_rewards import open_reward
from diffalign.stages.score import ScoreRequest, score
from helpers import pictures
from helpers.chat_server import Reply, chat_server, completion, images_of, text_of
from helpers.scored_items import made
from helpers.tiny_vlm import qwen_folder

pytestmark = pytest.mark.usefixtures("no_pauses")


def grey(level: int) -> Image.Image:
    return Image.new("RGB", (16, 16), (level, level, level))


def by_brightness(body: dict[str, Any], place_weight: float = 0.0) -> list[float]:
    """Scores of the shown images: brightness / 25.5, moved by the place."""
    levels = [np.asarray(image).mean() / 25.5 for image in images_of(body)]
    return [float(min(10, max(0, round(v + place_weight * n, 3)))) for n, v in enumerate(levels)]


def folder(path: Path, groups: dict[str, list[int]]) -> Path:
    path.mkdir()
    rows = []
    for n, (prompt, levels) in enumerate(groups.items()):
        for level in levels:
            grey(level).save(path / f"{n}-{level:03d}.png")
            rows.append({"file_name": f"{n}-{level:03d}.png", "prompt": prompt})
    (path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(path: Path) -> dict[str, dict[str, Any]]:
    return {Path(r["image"]).name: r for r in map(json.loads, path.read_text().splitlines())}


def test_the_worked_example() -> None:
    """Two passes (8, 3, 10, 0) and (6, 5, 9, 0); then the second cannot be read, and counts for nothing."""
    passes = [[8, 3, 10, 0], [6, 5, 9, 0]]
    images = [grey(level) for level in (10, 20, 30, 40)]

    def answer(body: dict[str, Any], n: int, second: bool = True) -> Reply:
        shown = [round(np.asarray(image).mean() / 10) - 1 for image in images_of(body)]
        number = 0 if shown == orders[0] else 1
        if number and not second:
            return completion("Sorry.")
        return completion("```json\n" + json.dumps({"scores": [passes[number][i] for i in shown]}) + "\n```")

    for second in (True, False):
        with chat_server(lambda body, n, second=second: answer(body, n, second)) as served:  # type: ignore[misc]
            reward = load_reward("group_judge", url=served.url, model="m")
            name = repr(("p", "0", "1", "2", "3"))
            orders = [ImageGroup("p", tuple(images), name).order(n) for n in (0, 1)]
            found = reward.measure(images, ["p"] * 4)
        assert orders[0] == orders[1][::-1] != [0, 1, 2, 3]
        wanted = [7.0, 4.0, 9.5, 0.0] if second else [8.0, 3.0, 10.0, 0.0]
        assert found["group_judge"].tolist() == wanted
        assert found["disagreement"].tolist() == pytest.approx(
            [1, 1, 0.5, 0] if second else [math.nan] * 4, nan_ok=True
        )
        places = [orders[0].index(i) / 3 for i in range(4)]
        assert found["place@1"].tolist() == pytest.approx(places) and found["score@1"].tolist() == passes[0]
        for body in served.bodies:
            labels = [p.get("text") for p in body["messages"][0]["content"]]
            assert labels[:8:2] == [f"Image {n}:" for n in (1, 2, 3, 4)] and "<prompt>\np\n</prompt>" in text_of(body)
            assert '{"scores": [x, x, x, x]}' in text_of(body) and "logprobs" not in body


def test_groups_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One request for each pass and group, a score that lives as long as its group, and a line about places."""
    source = folder(
        tmp_path / "in", {"a cat": [20, 120, 220], "a dog": [50, 100], "alone": [90], "many": [*range(10, 90, 10)]}
    )
    (source / "0-broken.png").write_bytes(b"nothing")
    with (source / "metadata.jsonl").open("a") as stream:
        stream.write(json.dumps({"file_name": "0-broken.png", "prompt": "a cat"}) + "\n")
    with chat_server(lambda body, n: completion(json.dumps({"scores": by_brightness(body, 0.2)}))) as served:
        reward = f"group_judge:url={served.url},model=m,largest=5"
        request = ScoreRequest([str(source)], [reward], output=tmp_path / "s.jsonl", batch_size=2)
        assert score(request) == 3
        assert sorted(len(images_of(body)) for body in served.bodies) == [2, 2, 3, 3, 4, 4, 4, 4]
        rows = rows_of(tmp_path / "s.jsonl")
        # The place adds 0.2 a step; shown once forwards and once backwards, it cancels up to a constant.
        cats = [rows[f"0-{level:03d}.png"]["group_judge"] for level in (20, 120, 220)]
        assert cats == pytest.approx([level / 25.5 + 0.2 for level in (20, 120, 220)], abs=2e-3)
        assert rows["2-090.png"]["group_judge"] is None and "no other image" in rows["2-090.png"]["group_judge.reason"]
        assert rows["0-broken.png"]["group_judge"] is None
        said = capsys.readouterr().out
        assert re.search(
            r"group_judge: position bias \+0\.\d\d \(correlation of score and place, 3 prompts\): too few", said
        )
        assert score(request) == 3 and len(served.bodies) == 8
        # A new image makes its group another one; the other groups keep their scores.
        grey(70).save(source / "1-070.png")
        with (source / "metadata.jsonl").open("a") as stream:
            stream.write(json.dumps({"file_name": "1-070.png", "prompt": "a dog"}) + "\n")
        assert score(request) == 3 and [len(images_of(body)) for body in served.bodies[8:]] == [3, 3]


def test_a_group_without_an_answer_costs_only_itself(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", {"a cat": [20, 120, 220], "a dog": [50, 100]})
    down = True

    def answer(body: dict[str, Any], n: int) -> Reply:
        if down and "a dog" in text_of(body):
            return 500, {"error": "x"}
        return completion(json.dumps({"scores": by_brightness(body)}))

    with chat_server(answer) as served:
        reward = f"group_judge:url={served.url},model=m,retries=0"
        request = ScoreRequest([str(source)], [reward], output=tmp_path / "s.jsonl")
        assert score(request) == 3
        rows = rows_of(tmp_path / "s.jsonl")
        assert [row["group_judge"] is None for row in rows.values()] == [False] * 3 + [True] * 2
        assert "answered 500" in rows["1-050.png"]["group_judge.reason"]
        cats = len([b for b in served.bodies if "a cat" in text_of(b)])
        down = False
        assert score(request) == 0 and cats == 2 == len([b for b in served.bodies if "a cat" in text_of(b)])


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ('{"scores": [1, 2.5, 10]}', [1, 2.5, 10]), ('<think>{"scores": [1,1,1]}</think> {"scores": [0, 0, 0]}', [0, 0, 0]),
        ('{"scores": [1, 2]}', None), ('{"scores": [1, 2, 11]}', None), ('{"scores": [1, 2, true]}', None),
        ('{"scores": [1, 2, "3"]}', None), ('{"scores": [1, 2, NaN]}', None), ("[1, 2, 3]", None), ("{", None), ("", None),
    ],
)  # fmt: skip
def test_what_counts_as_scores(text: str, scores: list[float] | None) -> None:
    assert scores_in(text, 3) == scores


@pytest.mark.parametrize(
    ("weight", "words"), [(1.0, "later score higher"), (-1.0, "later score lower"), (0.0, "none seen")]
)
def test_the_bias_by_place(weight: float, words: str) -> None:
    """Against numpy's own correlation of the centred scores."""
    rng = np.random.default_rng(0)
    prompts: list[str | None] = [f"p{i // 3}" for i in range(60)]
    scores = made([0.0] * 60, prompts)
    held = []
    for n, row in enumerate(scores.rows):
        for k in (1, 2):
            place = float(((n % 3) if k == 1 else 2 - n % 3) / 2)
            row |= {f"r.score@{k}": 5 + 3 * (n // 3) + weight * place + rng.normal() / 2, f"r.place@{k}": place}
            held.append((n // 3, row[f"r.score@{k}"], place))
    with chat_server(lambda body, n: completion("")) as served:
        (line,) = position_bias(scores, {"r": load_reward("group_judge", url=served.url, model="m")})
    table = np.array(held)
    centred = np.concatenate([table[table[:, 0] == g, 1:] - table[table[:, 0] == g, 1:].mean(0) for g in range(20)])
    assert (
        f"position bias {np.corrcoef(centred.T)[0, 1]:+.2f} " in line and line.endswith(words) and "20 prompts" in line
    )
    empty = Scores([], {"r": ("r",)})
    assert "nothing to compute" in position_bias(empty, {"r": load_reward("group_judge", url="http://h", model="m")})[0]


def test_trainers_refuse_it() -> None:
    section = RewardSection(name="group_judge", options={"url": "http://h/v1", "model": "m"}, detector=None)
    with pytest.raises(DiffalignError, match="compares images of one prompt; score a folder"):
        open_reward(section, "cpu")


# --- UnifiedReward-Think and -Flex ------------------------------------------------------------------------------

THINK = "<think>\n1. Aesthetics:\n  Image 1 (9/10) - ...\nTotal: ...\n</think>\n<answer>Image {} is better</answer>"
FLEX = '```json\n{{"categories": [{{"name": "A", "cat_winner": "Image 1"}}], "reason": "x", "winner": "Image {}"}}\n```'


@pytest.mark.parametrize(
    ("kind", "answer", "verdict"),
    [
        (UnifiedRewardThink, THINK.format(1), 0), (UnifiedRewardThink, THINK.format(2), 1),
        (UnifiedRewardThink, "<think>Image 1 is better", None),
        (UnifiedRewardThink, "<answer>Image 1 is better</answer>", None),
        (UnifiedRewardThink, THINK.format("1 or Image 2"), None), (UnifiedRewardThink, THINK.format(1) + THINK.format(2), 1),
        (UnifiedRewardFlex, FLEX.format(1), 0), (UnifiedRewardFlex, FLEX.format(2), 1),
        (UnifiedRewardFlex, FLEX.format("1/2"), None),
        (UnifiedRewardFlex, FLEX.format(1)[:60], None), (UnifiedRewardFlex, FLEX.format(1) + FLEX.format(2), None),
    ],
)  # fmt: skip
def test_what_counts_as_a_verdict(kind: type[PairReward], answer: str, verdict: int | None) -> None:
    assert kind.verdict(answer) == verdict


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen_folder(tmp_path_factory.mktemp("qwen3"), "qwen3_vl")


def answers(
    reward: PairReward, monkeypatch: pytest.MonkeyPatch, better: Callable[[float, float], int | None]
) -> list[tuple[float, float]]:
    seen: list[tuple[float, float]] = []

    def answer(first: Image.Image, second: Image.Image, prompt: str) -> str:
        seen.append((np.asarray(first).mean(), np.asarray(second).mean()))
        said = better(*seen[-1])
        return "<think></think>I cannot say" if said is None else THINK.format(said + 1)

    monkeypatch.setattr(reward, "answer", answer)
    return seen


def test_shares_of_wins_over_both_orders(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = load_reward("unifiedreward_think", weights=qwen)
    assert isinstance(reward, PairReward)
    images, prompts = [grey(v) for v in (50, 150, 100)], ["p"] * 3
    seen = answers(reward, monkeypatch, lambda a, b: int(b > a))
    found = reward.measure(images, prompts)
    assert found["unifiedreward_think"].tolist() == [0.0, 1.0, 0.5] and len(set(seen)) == 6
    # A judge that always says "Image 1" tells nothing: every image wins half, and the bias stands in the columns.
    answers(reward, monkeypatch, lambda a, b: 0)
    found = reward.measure(images, prompts)
    assert found["unifiedreward_think"].tolist() == [0.5] * 3
    assert found["score@1"].tolist() == [1.0] * 3 and found["score@2"].tolist() == [0.0] * 3
    answers(reward, monkeypatch, lambda a, b: None if 50 in (a, b) else int(b > a))
    found = reward.measure(images, prompts)
    assert found["unifiedreward_think"].isnan().tolist() == [True, False, False]
    assert "no verdict in the model's answer" in reward.reasons[0] and reward.reasons[1:] == ["", ""]


@pytest.mark.parametrize(
    ("name", "template"),
    [("unifiedreward_think", "qwen3vl"), ("unifiedreward_think", "qwen"), ("unifiedreward_flex", "flex")],
)
def test_a_tiny_model_is_asked_about_both_images(qwen: Path, name: str, template: str) -> None:
    """The chat has both images before the published words; random weights say nothing, which is NaN."""
    reward = load_reward(name, weights=qwen, template=template, max_new_tokens=4)
    assert isinstance(reward, PairReward)
    texts: list[str] = []
    processor = reward.processor
    call = type(processor).__call__

    class Watched(type(processor)):  # type: ignore[misc]
        def __call__(self, *args: Any, **options: Any) -> Any:
            texts.append(options["text"][0])
            return call(self, *args, **options)

    processor.__class__ = Watched
    found = reward.measure([pictures.smooth(1, 64, 64), pictures.smooth(2, 64, 64)], ["a cat {x}"] * 2)
    assert found[name].isnan().all() and all("no verdict" in reason for reason in reward.reasons)
    assert len(texts) == 2
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    for text in texts:
        assert text.startswith(f"<|im_start|>user\n{image * 2}{reward.instruction[:40]}") and "a cat {x}" in text
        assert "{prompt}" not in text and text.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_mistakes(qwen: Path) -> None:
    with pytest.raises(DiffalignError, match="template 'llava'; one of qwen3vl, qwen"):
        load_reward("unifiedreward_think", weights=qwen, template="llava")
    with pytest.raises(DiffalignError, match="largest at least 2"):
        load_reward("group_judge", url="http://h/v1", model="m", largest=1)
