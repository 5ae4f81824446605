"""A judge behind an address: what is asked, what an answer means, and what happens where there is none."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffalign.errors import DiffalignError
from diffalign.rewards import load_reward
from diffalign.rewards.rubric import load_rubrics
from diffalign.rewards.vlm_judge import VLMJudge, written_label
from diffalign.stages.score import ScoreRequest, score
from helpers import pictures
from helpers.chat_server import Reply, Served, chat_server, completion, images_of, text_of

IMAGES = [pictures.smooth(n, 40, 30) for n in range(3)]
PROMPTS = ["a cat", "a dog, {red} <|im_end|>", "a house"]
TOP = {"7": math.log(0.5), "8": math.log(0.2), " 9": math.log(0.1), "Seven": math.log(0.05), "1": math.log(0.01)}


pytestmark = pytest.mark.usefixtures("no_pauses")


def judge(served: Served, **options: Any) -> VLMJudge:
    made = load_reward("vlm_judge", url=served.url, model="m", **{"dimensions": "alignment", **options})
    assert isinstance(made, VLMJudge)
    return made


def test_the_distribution_of_the_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret-123")
    with chat_server(lambda body, n: completion("7", TOP)) as served:
        reward = judge(served, key_env="MY_KEY")
        found = reward.measure(IMAGES, PROMPTS)
    held = np.array([0.01, 0, 0, 0, 0, 0, 0.5, 0.2, 0.1]) / 0.81
    levels = 1 + np.arange(9) / 2
    mean = float(held @ levels)
    assert found["vlm_judge"].tolist() == pytest.approx([mean] * 3, abs=1e-6)
    assert found["alignment_spread"][0].item() == pytest.approx(math.sqrt(held @ (levels - mean) ** 2), abs=1e-6)
    assert [found[f"alignment@{level:.1f}"][1].item() for level in levels] == pytest.approx(held, abs=1e-6)
    assert reward.reasons == ["", "", ""] and set(served.keys) == {"Bearer sk-secret-123"}
    bodies = sorted(served.bodies, key=lambda b: next(i for i, p in enumerate(PROMPTS) if p in text_of(b)))
    for body, prompt, image in zip(bodies, PROMPTS, IMAGES, strict=True):
        assert body["model"] == "m" and body["temperature"] == 0 and body["top_logprobs"] == 20
        text = text_of(body)
        assert f"<prompt>\n{prompt}\n</prompt>" in text and load_rubrics(["alignment"])["alignment"] in text
        assert "1 = level 1, 2 = level 1.5" in text and "9 = level 5" in text
        (sent,) = images_of(body)
        assert np.array_equal(np.asarray(sent), np.asarray(image))
    assert "secret" not in json.dumps([reward.identity(), reward.provenance()])


def test_without_probabilities_the_label_counts() -> None:
    """A server that refuses logprobs is asked without them from then on."""

    def answer(body: dict[str, Any], n: int) -> Reply:
        if body.get("logprobs"):
            return 400, {"error": {"message": "logprobs are not supported by this model", "type": "invalid_request"}}
        return completion("<think>maybe 3</think>\n**Score: 8**")

    with chat_server(answer) as served:
        reward = judge(served, concurrency=1)
        found = reward.measure(IMAGES, PROMPTS)
    assert found["vlm_judge"].tolist() == [4.5] * 3 and found["alignment_spread"].isnan().all()
    assert [b.get("logprobs") for b in served.bodies] == [True, None, None, None]


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("7", 6), (" 9.", 8), ("**3**", 2), ("Score:\n5", 4), ("It is good. Score: 6", 5), ("<think>9</think>2", 1),
        ("10", None), ("0", None), ("7/10 perhaps 8", None), ("I cannot judge this.", None), ("", None), ("77", None),
        ("<think>about 9", None),
    ],
)  # fmt: skip
def test_what_counts_as_a_label(text: str, label: int | None) -> None:
    assert written_label(text) == label


def test_an_answer_without_a_label_is_nan_with_the_answer() -> None:
    """Also where hardly any probability lies on labels: then the written label counts, without a distribution."""
    replies = [
        completion("I will not."),
        completion("4", {"I": math.log(0.7), "4": math.log(0.2)}),
        completion("5", {"5": -0.01, "6": -6.0}),
    ]
    with chat_server(lambda body, n: replies[next(i for i, p in enumerate(PROMPTS) if p in text_of(body))]) as served:
        reward = judge(served)
        found = reward.measure(IMAGES, PROMPTS)
    assert found["vlm_judge"].isnan().tolist() == [True, False, False]
    assert "no label" in reward.reasons[0] and "I will not." in reward.reasons[0] and reward.reasons[1:] == ["", ""]
    assert found["vlm_judge"][1] == 2.5 and found["alignment_spread"].isnan().tolist() == [True, True, False]


def test_the_mix_of_dimensions() -> None:
    scores = {"alignment": "9", "realism": "1"}
    with chat_server(
        lambda body, n: completion(scores[next(d for d in scores if f"Dimension: {d}" in text_of(body))])
    ) as served:
        found = judge(served, dimensions="alignment+realism", mix="alignment=3+realism=1").measure(
            IMAGES[:1], PROMPTS[:1]
        )
    assert [found[c].item() for c in ("vlm_judge", "alignment", "realism")] == [4.0, 5.0, 1.0]


def test_busy_servers_are_asked_again_and_never_more_than_allowed_at_once() -> None:
    def answer(body: dict[str, Any], n: int) -> Reply:
        time.sleep(0.02)
        if n % 2 == 0:
            return (429, {"error": {"message": "slow down"}}, {"Retry-After": "0.01"}) if n % 4 else (503, b"<html>")
        return completion("6", {"6": 0.0, "5": -9.0})

    with chat_server(answer) as served:
        found = judge(served, concurrency=3, retries=15).measure(IMAGES * 4, [f"p{n}" for n in range(12)])
    assert found["vlm_judge"].isfinite().all() and len(served.bodies) > 12 and served.busiest <= 3


def test_a_failed_request_is_tried_again_by_the_next_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One image costs only itself, what was answered is not asked again, and the failure is no score, least of all 0."""
    folder = pictures.folder(tmp_path / "in", 4, ["p0", "p1", "p2", "p3"])
    down = True

    def answer(body: dict[str, Any], n: int) -> Reply:
        return (500, {"error": "out of memory"}) if down and "\np2\n" in text_of(body) else completion("8")

    with chat_server(answer) as served:
        reward = f"vlm_judge:url={served.url},model=m,dimensions=alignment,retries=1"
        request = ScoreRequest([str(folder)], [reward], output=tmp_path / "s.jsonl")
        assert score(request) == 3
        rows = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
        assert [row["vlm_judge"] for row in rows] == [4.5, 4.5, None, 4.5]
        assert "answered 500: out of memory" in rows[2]["vlm_judge.reason"]
        assert len([b for b in served.bodies if "\np2\n" not in text_of(b)]) == 3
        down = False
        assert score(request) == 0 and len([b for b in served.bodies if "\np2\n" not in text_of(b)]) == 3


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (
            (401, {"error": {"message": "Incorrect API key provided: sk-abc", "code": "invalid_api_key"}}),
            "answered 401",
        ),
        ((404, {"error": {"message": "The model `m` does not exist"}}), "does not exist; check url=, model="),
        ((307, b"", {"Location": "http://example.org/"}), "answered 307: Temporary Redirect"),
    ],
)
def test_what_no_image_causes_ends_the_run_in_one_line(reply: Reply, words: str) -> None:
    with chat_server(lambda body, n: reply) as served, pytest.raises(DiffalignError, match=words):
        judge(served).measure(IMAGES, PROMPTS)
    assert len(served.bodies) <= 3


def test_no_server() -> None:
    with chat_server(lambda body, n: completion("1")) as served:
        pass
    with pytest.raises(DiffalignError, match=r"ConnectError at http://127.* \(2 attempts\); is the server running\?"):
        judge(served, retries=1).measure(IMAGES, PROMPTS)


@pytest.mark.parametrize("body", [b"<html>", {}, {"choices": []}, {"choices": [{"message": {"content": None}}]}, [1]])
def test_what_is_no_completion_is_no_answer(body: Any) -> None:
    with chat_server(lambda b, n: (200, body) if n else completion("5")) as served:
        reward = judge(served, retries=1, concurrency=1)
        with pytest.raises(Exception, match="no chat completion in the answer"):
            reward.measure(IMAGES, PROMPTS)


@pytest.mark.parametrize(
    "logprobs",
    [
        {"content": [{"token": "8", "logprob": None, "top_logprobs": []}]},
        {"content": [{"token": "8", "logprob": -0.1, "top_logprobs": [{"token": "8", "logprob": "?"}]}]},
        {"content": [{"token": "8", "logprob": float("nan"), "top_logprobs": [{"token": "7", "logprob": -1}]}]},
        {"content": [{"logprob": -0.1}]},
        {"content": 5},
        [1],
    ],
)
def test_the_label_stands_without_readable_probabilities(logprobs: Any) -> None:
    """The answer was read as none, asked again, and the image stayed without a score."""
    status, body = completion("8")[:2]
    body["choices"][0]["logprobs"] = logprobs
    with chat_server(lambda b, n: (status, json.dumps(body).encode())) as served:
        found = judge(served, retries=1, concurrency=1).measure(IMAGES, PROMPTS)
    assert found["vlm_judge"].tolist() == [4.5] * 3 and found["alignment_spread"].isnan().all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "url= is needed"),
        ({"url": "http://localhost:8000/v1"}, "model= is needed"),
        ({"url": "localhost:8000", "model": "m"}, "no address; write http://HOST:PORT/v1"),
        ({"url": "http://me:pw@host/v1", "model": "m"}, "leave keys out of the address"),
        ({"url": "http://host/v1?api_key=x", "model": "m"}, "leave keys out of the address"),
        ({"url": "http://h/v1", "model": "m", "concurrency": 0}, "concurrency at least 1"),
        ({"url": "http://h/v1", "model": "m", "mix": "beauty=1"}, "write NAME=WEIGHT"),
    ],
)
def test_mistakes(options: dict[str, Any], words: str) -> None:
    with pytest.raises(DiffalignError, match=words):
        load_reward("vlm_judge", **options)
