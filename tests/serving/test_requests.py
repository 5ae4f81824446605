"""What may be sent to a reward server, and what it answers: forms, errors of one image, and bodies of strangers."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from diffalign.rewards import load_reward
from helpers.counting_reward import Counting
from helpers.pictures import bomb, encoded, smooth
from helpers.served import Running, Slow, serving

IMAGES = [smooth(seed, 40 + seed, 30) for seed in range(3)]
FILES = [encoded(image, "PNG") for image in IMAGES]
BASE64 = [base64.b64encode(file).decode() for file in FILES]
WIDTHS = [40.0, 41.0, 42.0]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    rewards = {"slow": Slow(), "sharpness": load_reward("sharpness")}
    with serving(rewards, images=16, pixels=1_000_000) as running:
        yield running


def score(server: Running, **content: Any) -> Any:
    answer = httpx.post(f"{server.root}/v1/score", timeout=30, **content)
    assert answer.status_code == 200, answer.text
    return answer.json()


def scores(answer: Any, label: str = "slow") -> list[float]:
    return [one[label]["score"] for one in answer["results"]]


def test_every_form_gives_the_same_answer(server: Running) -> None:
    prompts = ["a", "b", "c"]
    as_json = score(server, json={"images": BASE64, "prompts": prompts, "rewards": ["slow"]})
    assert scores(as_json) == WIDTHS and set(as_json["results"][0]) == {"slow"}
    assert as_json["results"][0]["slow"]["columns"] == {"slow": 40.0, "batch": 3.0}
    uris = [f"data:image/png;base64,{image}" for image in BASE64]
    assert score(server, json={"images": uris, "prompts": prompts, "rewards": ["slow"]}) == as_json
    parts = [("image", ("a.png", file, "image/png")) for file in FILES]
    assert score(server, files=parts, data={"prompt": prompts, "reward": "slow"}) == as_json
    packed = {"request": json.dumps({"prompts": prompts, "rewards": ["slow"]})}
    assert score(server, files=[("images", part) for _, part in parts], data=packed) == as_json
    # One prompt for all images.
    assert scores(score(server, files=parts, data={"prompt": "a"})) == WIDTHS
    assert scores(score(server, json={"images": BASE64, "prompts": "a"})) == WIDTHS


def test_several_rewards_in_one_request_and_by_default_all(server: Running) -> None:
    answer = score(server, json={"images": BASE64, "prompts": "a"})
    expected = load_reward("sharpness").score(IMAGES, ["a"] * 3).tolist()
    assert scores(answer) == WIDTHS and scores(answer, "sharpness") == expected
    assert list(answer["results"][0]) == ["slow", "sharpness"] == list(answer["rewards"])


def test_metadata_reaches_the_reward() -> None:
    rewards = {"geneval": load_reward("geneval", detector=_detector())}
    facts = {"tag": "single_object", "include": [{"class": "circle", "count": 1}]}
    with serving(rewards) as server:
        answer = score(server, json={"images": BASE64[:2], "prompts": "a circle", "metadata": [facts, {}]})
    found, without = (one["geneval"] for one in answer["results"])
    assert found["score"] == 0.0 and set(found["columns"]) >= {"dense", "official", "exact"}
    assert "metadata" in without["error"] and "score" not in without


def _detector() -> Any:
    from diffalign.testbed.detector import ShapeDetector

    return ShapeDetector()


def test_the_form_of_flow_factory(server: Running) -> None:
    """Its client sends prompt and image and other keys; its server's template reads prompts and images."""
    theirs = {"prompt": ["a"] * 3, "image": BASE64, "video": None, "condition_images": None, "kwargs": None}
    for names in (theirs, {"prompts": ["a"] * 3, "images": BASE64}):
        for path in ("/slow/compute", "/compute?reward=slow"):
            answer = httpx.post(server.root + path, json=names, timeout=30)
            assert (answer.status_code, answer.json()) == (200, {"rewards": WIDTHS})
    assert httpx.get(f"{server.root}/slow/health").json()["status"] == "ok"
    ambiguous = httpx.post(f"{server.root}/compute", json={"prompt": ["a"], "image": BASE64[:1]})
    assert ambiguous.status_code == 400 and "name one: /NAME/compute" in ambiguous.json()["error"]
    # Where one image has no score there is no number to send in its place.
    odd = httpx.post(f"{server.root}/slow/compute", json={"prompt": ["a", "odd", "b"], "image": BASE64})
    assert (odd.status_code, odd.json()) == (422, {"error": "image 1 has no score: an odd prompt"})


def test_an_image_without_a_score_has_an_error_and_no_number(server: Running) -> None:
    images = [BASE64[0], BASE64[1], base64.b64encode(b"no image").decode(), "!!", "", base64.b64encode(bomb()).decode()]
    answer = score(server, json={"images": [*images, BASE64[2]], "prompts": ["a", "odd", "a", "a", "a", "a", None]})
    found = [one["slow"] for one in answer["results"]]
    assert found[0]["score"] == 40.0
    reasons = [
        "an odd prompt",
        "not an image of a known format",
        "no base64",
        "empty file",
        "exceeds limit",
        "no prompt",
    ]
    for one, reason in zip(found[1:], reasons, strict=True):
        assert reason in one["error"] and "score" not in one and not one.get("failed"), one
    # Another reward, which needs no prompt, scores what can be decoded.
    assert [("score" in one["sharpness"]) for one in answer["results"]] == [
        True,
        True,
        False,
        False,
        False,
        False,
        True,
    ]


def test_a_request_whose_image_breaks_the_reward_costs_itself_alone(server: Running) -> None:
    answer = score(server, json={"images": BASE64, "prompts": ["a", "broken", "c"], "rewards": ["slow"]})
    found = [one["slow"] for one in answer["results"]]
    assert (found[0]["score"], found[2]["score"]) == (40.0, 42.0)
    assert found[1] == {"error": "ValueError: a broken prompt", "failed": True}


class Trap:
    """What runs when a pickle of it is read."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("trap",)


def test_a_pickle_is_not_read(server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    body = pickle.dumps({"images": FILES, "prompts": [Trap()]})
    for path in ("/", "/v1/score", "/compute", "/slow/compute"):
        for headers in ({}, {"Content-Type": "application/json"}, {"Content-Type": "application/octet-stream"}):
            answer = httpx.post(server.root + path, content=body, headers=headers, timeout=30)
            assert answer.status_code == 415 and "pickle is not read" in answer.json()["error"], (path, headers)
    assert not (tmp_path / "trap").exists()


def image_bomb() -> bytes:
    """A PNG of 144 million grey pixels in some hundred kilobytes."""
    buffer = io.BytesIO()
    Image.new("1", (12_000, 12_000)).save(buffer, "PNG", compress_level=9)
    return buffer.getvalue()


FORM = "multipart/form-data; boundary=x"
HOSTILE = {
    "nothing": ("application/json", b"", 400),
    "no json": ("application/json", b"{]", 400),
    "a list": ("application/json", b"[]", 400),
    "deep": ("application/json", b"[" * 100_000, 400),
    "deep metadata": ("application/json", b'{"metadata":[' + b'{"a":' * 50_000, 400),
    "cut": ("application/json", json.dumps({"images": BASE64}).encode()[:-20], 400),
    "not utf-8": ("application/json", b'{"images": ["\xff\xfe"]}', 400),
    "lone surrogate": ("application/json", b'{"images": ["aaaa"], "prompts": ["\\ud800"]}', 400),
    "numbers": ("application/json", b'{"images": [1, 2], "prompts": [3, 4]}', 400),
    "huge number": ("application/json", b'{"images": ' + b"9" * 5000 + b"}", 400),
    "mistyped key": ("application/json", b'{"image": ["aaaa"]}', 400),
    "no images": ("application/json", b'{"images": [], "prompts": []}', 400),
    "prompts that do not fit": (
        "application/json",
        json.dumps({"images": BASE64, "prompts": ["a", "b"]}).encode(),
        400,
    ),
    "metadata that does not fit": ("application/json", json.dumps({"images": BASE64, "metadata": [{}]}).encode(), 400),
    "unknown reward": ("application/json", json.dumps({"images": BASE64, "rewards": ["../../etc"]}).encode(), 404),
    "too many images": ("application/json", json.dumps({"images": ["aaaa"] * 17}).encode(), 413),
    "too large": ("application/json", b'{"images": ["' + b"a" * 2**22 + b'"]}', 413),
    "another kind": ("application/xml", b"<!DOCTYPE a>", 415),
    "a form without a boundary": ("multipart/form-data", b"--x", 400),
    "a cut form": (FORM, b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\nabc', 400),
    "a form of noise": (FORM, os.urandom(1000), 400),
    "a part without a name": (FORM, b"--x\r\n\r\nabc\r\n--x--\r\n", 400),
    "a form with too many parts": (
        FORM,
        b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\nabc\r\n' * 17 + b"--x--\r\n",
        413,
    ),
    "a form with a long field": (
        FORM,
        b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n' + b"a" * 2**21 + b"\r\n--x--\r\n",
        400,
    ),
    "a form with an unknown field": (
        FORM,
        b'--x\r\nContent-Disposition: form-data; name="q"\r\n\r\na\r\n--x--\r\n',
        400,
    ),
    "a form with a strange file": (
        FORM,
        b'--x\r\nContent-Disposition: form-data; name="q"; filename="../../a"\r\n\r\na\r\n--x--\r\n',
        400,
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_body_costs_its_sender_one_line(server: Running, name: str) -> None:
    kind, body, status = HOSTILE[name]
    answer = httpx.post(f"{server.root}/v1/score", content=body, headers={"Content-Type": kind}, timeout=30)
    line = answer.json()["error"]
    assert answer.status_code == status, line
    assert set(answer.json()) == {"error"} and "\n" not in line and 0 < len(line) < 300
    assert scores(score(server, json={"images": BASE64, "prompts": "a"})) == WIDTHS
    assert server.service.waiting == 0


def test_an_image_bomb_is_not_unpacked(server: Running) -> None:
    packed = image_bomb()
    assert len(packed) < 2**20
    answer = score(server, files=[("image", ("a.png", packed))] * 8, data={"prompt": "a"})
    assert all("12000 x 12000 pixels, more than 1 million" in one["slow"]["error"] for one in answer["results"])


def test_what_is_not_finite_is_no_number_in_an_answer() -> None:
    counting = Counting()
    counting.measure = lambda images, prompts, metadata=None: _odd_numbers(counting, len(images))  # type: ignore[method-assign]
    with serving({"counting": counting}) as server:
        text = httpx.post(f"{server.root}/v1/score", json={"images": BASE64, "prompts": "a"}).text
    assert "NaN" not in text and "Infinity" not in text
    found = [one["counting"] for one in json.loads(text)["results"]]
    assert found[0] == {"score": 1.0, "columns": {"brightness": 1.0, "width": None}}
    assert found[1] == found[2] == {"error": "the reward gave no number"}


def _odd_numbers(counting: Counting, count: int) -> Any:
    import torch

    counting.reasons = [""] * count
    return {"brightness": torch.tensor([1.0, math.nan, math.inf]), "width": torch.tensor([math.nan, 1.0, 1.0])}


def test_the_page_shows_what_is_served_as_text() -> None:
    slow = Slow()
    slow.usual = "<script>alert(1)</script>"
    with serving({"slow": slow}) as server:
        answer = httpx.get(server.root)
    assert "&lt;script&gt;alert(1)" in answer.text and "<script>alert" not in answer.text
    assert f"{server.root}/v1/score -F image=@picture.png" in answer.text
    nonce = answer.headers["content-security-policy"].split("'nonce-")[1].split("'")[0]
    assert answer.text.count("<script") == answer.text.count(f'<script nonce="{nonce}">') == 1
    assert "http-equiv" not in answer.text  # a second policy in the page would forbid what the first allows
