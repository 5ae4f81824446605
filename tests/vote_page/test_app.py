"""The app of the voting page: what requests may do, and what a vote leaves in the log."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient

from diffalign.vote_page.app import LONGEST_BODY, VotePage
from diffalign.vote_page.gallery import open_gallery
from diffalign.vote_page.session import Sessions
from diffalign.voting.balanced import Balanced
from diffalign.voting.log import VoteLog
from diffalign.voting.questions import Sampler
from diffalign.voting.repeats import Repeats
from diffalign.web import Address, Limits, build_app
from helpers.files import json_lines
from helpers.vote_data import EVIL, colour_of, colours, folder_of, full_disk, kept

Open = Callable[..., TestClient]


@pytest.fixture
def opened() -> Iterator[Open]:
    """Open a client of a new server on sources."""
    logs: list[VoteLog] = []

    def client(
        *sources: Path, address: Address | None = None, sampler: Sampler | None = None, **options: Any
    ) -> TestClient:
        gallery = open_gallery(list(sources))
        logs.append(VoteLog(gallery.log))
        page = VotePage(Sessions(gallery, logs[-1], sampler or Balanced(), **options), "me", ["next <step>"])
        app = build_app(page.routes(), address or Address(), Limits(body=LONGEST_BODY))
        return TestClient(app, base_url="http://127.0.0.1:8017")

    yield client
    for log in logs:
        log.__exit__(None, None, None)


def asked(client: TestClient, rater: str = "me") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = client.get(f"/questions?rater={rater}").json()["questions"]
    return found


def give(client: TestClient, answer: str, rater: str = "me", **more: object) -> Any:
    question = asked(client, rater)[0]["id"]
    answered = client.post(f"/vote?rater={rater}", json={"question": question, "answer": answer, **more})
    assert answered.status_code == 200, answered.json()
    return answered.json()


def test_a_vote_is_in_the_log_with_what_was_shown(tmp_path: Path, opened: Open) -> None:
    data = colours(tmp_path / "data", 3)
    client = opened(data)
    first = asked(client)[0]
    pixels = [Image.open(io.BytesIO(client.get(url).content)).getpixel((3, 3)) for url in first["images"]]
    give(client, "left", note=" sharp ", seconds=1.25)
    [row] = json_lines(data / "votes.jsonl")
    assert [colour_of(name) for name in row["images"]] == [list(pixel) for pixel in pixels]
    assert row["models"] == [("base", "tuned")[int(name[-1])] for name in row["images"]]
    assert (row["id"], row["prompt"], row["answer"], row["rater"]) == (first["id"], first["prompt"], "left", "me")
    assert (row["note"], row["seconds"], row["asked_by"], row["repeat_of"]) == ("sharp", 1.25, "balanced", None)


def test_a_vote_that_is_sent_twice_counts_once(tmp_path: Path, opened: Open) -> None:
    client = opened(colours(tmp_path / "data", 3))
    body = {"question": asked(client)[0]["id"], "answer": "left"}
    answers = [client.post("/vote", json=body).json() for _ in range(2)]
    assert answers[0] == answers[1]
    assert len(json_lines(tmp_path / "data" / "votes.jsonl")) == 1


def test_a_server_that_starts_again_asks_the_same_and_takes_the_answer(tmp_path: Path, opened: Open) -> None:
    data = colours(tmp_path / "data", 8, 3)
    client = opened(data)
    for answer in ("left", "skip", "tie"):
        give(client, answer)
    held = asked(client)
    again = opened(data)
    # The page may send the vote before it asks for questions.
    assert again.post("/vote", json={"question": held[0]["id"], "answer": "right"}).status_code == 200
    assert [one["id"] for one in asked(again)[:3]] == [one["id"] for one in held[1:]]
    assert [row["answer"] for row in kept(data / "votes.jsonl", "me")] == ["left", "skip", "tie", "right"]
    assert again.post("/vote", json={"question": "0" * 16, "answer": "right"}).status_code == 409


def test_undo_asks_the_same_pair_again_also_after_a_start(tmp_path: Path, opened: Open) -> None:
    data = colours(tmp_path / "data", 8)
    client = opened(data)
    give(client, "left")
    second = asked(client)[0]
    give(client, "right")
    back = client.post("/undo", json={}).json()
    shown = [one["images"] for one in back["questions"]]
    assert shown[0] == second["images"] and back["questions"][0]["id"] != second["id"]
    assert back["progress"]["done"] == 1
    assert asked(opened(data))[0]["id"] == back["questions"][0]["id"]
    give(client, "tie")
    assert client.post("/undo?rater=ben", json={}).json()["progress"]["done"] == 0  # nothing of others
    assert [row["answer"] for row in kept(data / "votes.jsonl", "me")] == ["left", "tie"]


def test_a_full_disk_is_said_and_the_question_stays(tmp_path: Path, opened: Open) -> None:
    data = colours(tmp_path / "data", 3)
    client = opened(data)
    give(client, "left")
    before, first = (data / "votes.jsonl").read_bytes(), asked(client)[0]
    with full_disk(len(before) + 9):
        answered = client.post("/vote", json={"question": first["id"], "answer": "left"})
        taken_back = client.post("/undo", json={})
    assert answered.status_code == taken_back.status_code == 507 and "answer again" in answered.json()["error"]
    assert asked(client)[0] == first and (data / "votes.jsonl").read_bytes() == before
    give(client, "right")
    assert [row["answer"] for row in kept(data / "votes.jsonl", "me")] == ["left", "right"]


def test_the_total_counts_repeats(tmp_path: Path, opened: Open) -> None:
    client = opened(colours(tmp_path / "data", 10, 3), sampler=Repeats(Balanced(), 0.3))
    totals = [client.get("/questions").json()["progress"]["total"]]
    while asked(client):
        totals.append(give(client, "left")["progress"]["total"])
    assert set(totals) == {len(totals) - 1} and totals[0] > 33


def test_each_pair_once_then_the_end(tmp_path: Path, opened: Open) -> None:
    data = colours(tmp_path / "data", 2, 3)
    client = opened(data)
    pairs = set()
    while questions := asked(client):
        assert len(questions) <= 4
        pairs.add(frozenset(questions[0]["images"]))
        give(client, "skip" if len(pairs) == 1 else "left")
    assert len(pairs) == 6
    assert client.get("/questions").json()["progress"] == {"done": 5, "total": 5, "seconds_left": None}
    result = client.get("/result").json()
    assert result["votes"] == 6 and [(one["a"], one["b"]) for one in result["tallies"]] == [("base", "tuned")]
    counts = result["tallies"][0]
    own = [row for row in kept(data / "votes.jsonl", "me") if set(row["models"]) == {"base", "tuned"}]
    wins = [row["models"][0] for row in own if row["answer"] == "left"]
    assert (counts["a_wins"], counts["b_wins"], counts["ties"]) == (wins.count("base"), wins.count("tuned"), 0)


def test_n_and_minutes_end_the_questions(tmp_path: Path, opened: Open) -> None:
    client = opened(colours(tmp_path / "a", 5), most=2)
    assert len(asked(client)) == 2
    give(client, "left")
    give(client, "skip")  # says nothing, and does not count
    assert give(client, "right")["questions"] == []
    clock = [0.0]
    timed = opened(colours(tmp_path / "b", 5), minutes=2, clock=lambda: clock[0])
    assert timed.get("/questions").json()["progress"]["seconds_left"] == 120
    clock[0] = 119.0
    assert asked(timed)
    clock[0] = 121.0
    assert not asked(timed)


def test_rankings_and_scores(tmp_path: Path, opened: Open) -> None:
    data = colours(tmp_path / "data", 2, 4)
    client = opened(data, size=4, rubric=("alignment",))
    give(client, "ranking", ranking=[2, 1, 2, 4], scores={"alignment": [5, None, 1, 2.5]})
    give(client, "both_bad", scores={"alignment": [None] * 4})
    rows = json_lines(data / "votes.jsonl")
    assert [row["ranking"] for row in rows] == [[2, 1, 2, 4], []]
    assert [row["scores"] for row in rows] == [{"alignment": [5, None, 1, 2.5]}, {}]


@pytest.mark.parametrize(
    ("body", "status", "fault"),
    [
        ({"answer": "best"}, 400, "answer"),
        ({"answer": "ranking", "ranking": [1, 2]}, 200, ""),
        ({"answer": "ranking", "ranking": [1, 3]}, 400, "a rank from 1 for each image"),
        ({"answer": "ranking", "ranking": [1]}, 400, "a rank from 1 for each image"),
        ({"answer": "left", "scores": {"mood": [1, 2]}}, 400, "'mood' is not asked here"),
        ({"answer": "left", "note": "x" * 2001}, 400, "more than 2000 characters"),
        ({"answer": "left", "note": "x" * 70_000}, 413, "more than 65536 bytes"),
        ({"answer": "left", "seconds": "soon"}, 400, "seconds"),
        ([1], 400, "no JSON object"),
    ],
)
def test_only_answers_are_kept(tmp_path: Path, opened: Open, body: Any, status: int, fault: str) -> None:
    client = opened(colours(tmp_path / "data", 2))
    sent = {"question": asked(client)[0]["id"], **body} if isinstance(body, dict) else body
    answered = client.post("/vote", json=sent)
    assert answered.status_code == status
    assert fault in answered.json().get("error", "")
    assert len(json_lines(tmp_path / "data" / "votes.jsonl")) == (status == 200)


@pytest.mark.parametrize("rater", ["a.b", "../x", "sharpness", "x" * 200])
def test_a_name_that_is_no_source_gets_no_questions(tmp_path: Path, opened: Open, rater: str) -> None:
    data = colours(tmp_path / "data", 2)
    (data / "scores").mkdir()
    (data / "scores" / "sharpness.parquet").write_bytes(b"")  # its name alone is looked at
    client = opened(data)
    answered = client.get("/questions", params={"rater": rater})
    assert answered.status_code == 400 and "rater" in answered.json()["error"]
    assert client.get("/", params={"rater": rater}).status_code == 200  # the page says so


def test_names_of_raters_do_not_fill_the_memory(tmp_path: Path, opened: Open) -> None:
    client = opened(colours(tmp_path / "data", 2))
    states = {client.get(f"/questions?rater=r{n}").status_code for n in range(101)}
    assert states == {200, 400}


def test_the_page_holds_prompts_as_data_and_no_names(tmp_path: Path, opened: Open) -> None:
    client = opened(colours(tmp_path / "data", 1))
    shown = client.get("/", params={"rater": "</script><b>"})
    assert "</script><b>" not in shown.text and "next <step>" not in shown.text
    assert "base" not in client.get("/questions").text and "g00000" not in client.get("/questions").text
    assert asked(client)[0]["prompt"] == EVIL
    assert "http-equiv" not in shown.text and shown.text.count('<link rel="icon" href="data:,">') == 1
    policy = shown.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe-inline" not in policy.partition("script-src")[2].partition(";")[0]


def test_only_the_images_that_are_voted_on_are_served(tmp_path: Path, opened: Open) -> None:
    (tmp_path / "secret.png").write_bytes(b"secret")
    client = opened(folder_of(tmp_path / "data", {"a.png": "fox", "b.png": "fox", "c.png": "alone"}))
    start = asked(client)[0]["images"][0].split("/")[1]
    known = [client.get(f"/image/{start}/{n}").status_code for n in range(4)]
    assert known == [200, 200, 404, 404]
    for path in ("../secret.png", "..%2fsecret.png", "%2e%2e/secret.png", "-1", "a.png", "99999999999999999999"):
        assert client.get(f"/image/{start}/{path}").status_code == 404
    assert client.get("/image/00000000/0").status_code == 404  # of another start of the server


def test_images_are_sent_as_they_are_or_as_png(tmp_path: Path, opened: Open) -> None:
    folder = folder_of(tmp_path / "data", {f"{n}.png": "fox" for n in "abcd"})
    image = Image.new("RGB", (8, 8), (200, 0, 0))
    for name, kind in (("b", "JPEG"), ("c", "TIFF"), ("d", "WEBP")):
        image.save(folder / f"{name}.png", kind, **({} if kind == "TIFF" else {"quality": 90}))
    client = opened(folder)
    start = asked(client)[0]["images"][0].split("/")[1]
    answers = [client.get(f"/image/{start}/{n}") for n in range(4)]
    kinds = sorted((a.headers["content-type"], Image.open(io.BytesIO(a.content)).format or "") for a in answers)
    assert kinds == [("image/jpeg", "JPEG"), ("image/png", "PNG"), ("image/png", "PNG"), ("image/webp", "WEBP")]
    raw = {path.read_bytes() for path in folder.glob("*.png")}
    assert sum(a.content in raw for a in answers) == 3
    (folder / "a.png").write_bytes(b"<script>")
    broken = [client.get(f"/image/{start}/{n}") for n in range(4)]
    assert sorted(a.status_code for a in broken) == [200, 200, 200, 422]


def test_another_host_needs_the_token(tmp_path: Path, opened: Open) -> None:
    token = "0123456789abcdef"
    client = opened(colours(tmp_path / "data", 2), address=Address("0.0.0.0", token=token))
    paths = ("/", "/questions", "/result", "/image/x/0")
    assert [client.get(path).status_code for path in paths] == [401] * 4
    assert client.post("/vote", json={}).status_code == client.post("/undo", json={}).status_code == 401
    assert client.get("/", params={"token": token}, headers={"accept": "text/html"}).status_code == 200
    assert client.get("/questions").status_code == 200  # the cookie of the page
    assert client.post("/undo", json={}, headers={"origin": "http://evil.example"}).status_code == 403
    assert client.get("/questions", headers={"host": "evil.example"}).status_code == 403
