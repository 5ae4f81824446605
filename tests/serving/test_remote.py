"""The client of `diffalign serve`: the served numbers in every command, retries, and one clear error at the end."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import diffalign
from diffalign.config.run import RewardSection
from diffalign.errors import DiffalignError
from diffalign.rewards import load_reward
from diffalign.rewards.remote_protocol import Catalogue
from diffalign.scoring.spec import parse
from diffalign.stages.resolve_rewards import open_reward
from diffalign.stages.score import ScoreRequest, score
from helpers import command_line
from helpers.http_server import Quiet, http_server
from helpers.pictures import folder, smooth
from helpers.processes import environment
from helpers.served import Slow, serving
from helpers.tiny_rewards import clip_folder

IMAGES = [smooth(seed, 60 + seed, 50) for seed in range(5)]
PROMPTS = [f"a picture of {n}" for n in range(5)]
TOKEN = "0123456789abcdef"


@pytest.mark.parametrize("encoding", ["auto", "png", "ppm"])
def test_the_numbers_are_those_of_the_reward_itself(tmp_path_factory: pytest.TempPathFactory, encoding: str) -> None:
    weights = tmp_path_factory.getbasetemp() / "served-clip"
    if not weights.exists():
        clip_folder(weights)
    rewards = {
        "mine": load_reward("clipscore", weights=weights, convention="cosine"),
        "jpeg": load_reward("jpeg_compressibility"),
    }
    with serving(dict(rewards)) as server:
        for label, reward in rewards.items():
            remote = load_reward("remote", url=f"{server.root}/{label}", encoding=encoding)
            ours, theirs = reward.measure(IMAGES, PROMPTS), remote.measure(IMAGES, PROMPTS)
            assert list(ours) == list(theirs) == list(remote.columns)
            # The images come one after another, so that batches may differ from ours.
            for name, values in ours.items():
                assert values.dtype == theirs[name].dtype
                torch.testing.assert_close(theirs[name], values, rtol=0, atol=1e-6)
            assert remote.identity() == reward.identity() and remote.provenance() == reward.provenance()
            assert (remote.name, remote.reasons) == (label, [""] * 5)
            with pytest.raises(DiffalignError, match="not differentiable"):
                remote.score_tensors(torch.zeros(1, 3, 8, 8), ["a"])


def test_equal_batches_give_equal_bits(tmp_path: Path) -> None:
    clip = load_reward("clipscore", weights=clip_folder(tmp_path), convention="cosine")
    with serving({"clip": clip}, wait=5.0) as server:  # so that the five images are one batch, as here
        remote = load_reward("remote", url=server.root)
        assert torch.equal(remote.score(IMAGES, PROMPTS), clip.score(IMAGES, PROMPTS))


def test_an_image_without_a_score_keeps_its_reason() -> None:
    with serving({"slow": Slow()}) as server:
        remote = load_reward("remote", url=server.root)
        scores = remote.score(IMAGES[:3], ["a", "odd", "b"])
        assert scores[[0, 2]].tolist() == [60.0, 62.0] and bool(scores[1].isnan())
        assert remote.reasons == ["", "an odd prompt", ""]
        assert remote.reason_not_scorable(" ", {}) == "no prompt"
        # A reward that failed is no answer of the reward: it is raised, as by the reward itself.
        with pytest.raises(Exception, match="a broken prompt"):
            remote.score(IMAGES[:2], ["a", "broken"])


def test_large_batches_are_sent_in_parts() -> None:
    slow = Slow()
    with serving({"slow": slow}, body=40_000, images=4) as server:
        remote = load_reward("remote", url=server.root, encoding="ppm")  # 60 x 50 x 3 bytes each
        scores = remote.score([*IMAGES, *IMAGES], [*PROMPTS, *PROMPTS])
        assert scores.tolist() == [60.0, 61.0, 62.0, 63.0, 64.0] * 2
        assert server.service.metrics.requests == 4  # 3 + 3 + 3 + 1: the limit of bytes
        assert load_reward("remote", url=server.root).score([], []).shape == (0,)


def test_score_gives_the_same_table_and_resumes_from_either(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = folder(tmp_path / "pictures", 4, ["a"] * 4)
    with serving({"sharpness": load_reward("sharpness")}) as server:
        there, here = f"remote:url={server.root}/sharpness", "sharpness"
        for name, first, second in (("a.jsonl", there, here), ("b.jsonl", here, there)):
            for reward, asked in ((first, True), (second, False)):
                before = server.service.metrics.requests
                assert command_line.run("score", pictures, "-r", reward, "-o", tmp_path / name) == 0
                assert (server.service.metrics.requests > before) == (asked and reward == there)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert '"sharpness"' in (tmp_path / "a.jsonl").read_text()


def test_a_section_of_a_config_names_it() -> None:
    with serving({"slow": Slow()}) as server:
        for given in ({"url": f"{server.root}/slow"}, {"options": {"url": f"{server.root}/slow"}}):
            section = RewardSection.model_validate({"name": "remote", **given})
            reward = open_reward(section, "cpu")
            assert section.label == section.written_name == reward.name == "slow"
            assert reward.score(IMAGES[:1], ["a"]).tolist() == [60.0]
        alone = RewardSection(name="remote", url=server.root)
        assert alone.label == open_reward(alone, "cpu").name == "remote"
    for wrong, line in (
        ({"name": "remote"}, "it needs the server's address"),
        ({"name": "hpsv2", "url": "http://a:1/b"}, "set name=remote"),
        ({"name": "remote", "url": f"http://a:1/b?token={TOKEN}"}, "put it into DIFFALIGN_TOKEN"),
    ):
        with pytest.raises(ValueError, match=line):
            RewardSection.model_validate(wrong)
    spec = parse("remote:url=http://gpu1:8000/hpsv2,timeout=5")
    assert (spec.label, spec.name, spec.options) == ("hpsv2", "remote", {"url": "http://gpu1:8000/hpsv2", "timeout": 5})
    for wrong in ("human", "a/b", "..", "a%20b"):
        with pytest.raises(DiffalignError, match="--reward"):
            parse(f"remote:url=http://gpu1:8000/{wrong}")
    assert parse("mine=remote:url=http://gpu1:8000/hpsv2").label == "mine"


@pytest.mark.parametrize(
    ("url", "line"),
    [
        (None, "give the server's address"),
        ("gpu1:8000", "write http://host:port/reward"),
        ("ftp://gpu1/hpsv2", "write http://host:port/reward"),
        ("http://user:word@gpu1/hpsv2", "leave the token out of the address; put it into DIFFALIGN_TOKEN"),
        ("http://gpu1:99999/hpsv2", "Port out of range"),
        ("http://gpu1:8000/hpsv2?x=1", "write http://host:port/reward"),
        ("http://127.0.0.1:1/hpsv2", "no answer from http://127.0.0.1:1 in 1 try over 0 s"),
    ],
)
def test_an_address_that_cannot_be_used_is_one_line(url: str | None, line: str) -> None:
    with pytest.raises(DiffalignError, match=re.escape(line)):
        load_reward("remote", url=url, patience=0)


def test_a_wait_for_a_server_is_said_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Without that, an address that is wrong is silent for `patience`, which is two minutes by default."""
    with pytest.raises(DiffalignError, match=r"no answer from http://127.0.0.1:1 in \d tries over 0.5 s"):
        load_reward("remote", url="http://127.0.0.1:1/hpsv2", patience=0.5)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and re.search(
        r"no answer from http://127.0.0.1:1 \(.*refused.*\); trying for \d s more", said[0]
    )


@pytest.mark.parametrize(("status", "said"), [(503, False), (429, False), (502, True), (504, True)])
def test_a_short_wait_for_a_busy_server_is_not_said(
    status: int, said: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """A proxy whose server is gone is no busy server."""
    answers = [(status, b""), (status, b""), (404, b"{}")]
    with stranger(lambda path: answers.pop(0)) as url, pytest.raises(DiffalignError, match="404"):
        load_reward("remote", url=url, patience=20)
    assert not answers and len(capsys.readouterr().err.splitlines()) == said


@pytest.mark.parametrize("python", [True, False])
def test_a_server_is_asked_only_when_there_are_images(tmp_path: Path, python: bool) -> None:
    (tmp_path / "empty").mkdir()
    dead = "remote:url=http://127.0.0.1:1/hpsv2,patience=60"
    started = time.monotonic()
    with pytest.raises(DiffalignError, match="empty"):
        if python:
            diffalign.score(tmp_path / "empty", rewards=dead)
        else:
            score(ScoreRequest([str(tmp_path / "empty")], [dead]))
    assert time.monotonic() - started < 10


def test_what_a_server_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIFFALIGN_TOKEN", raising=False)
    with serving({"slow": Slow(), "double": Slow(2.0)}, token=TOKEN) as server:
        with pytest.raises(DiffalignError, match="401 a token is needed, or another one: put it into DIFFALIGN_TOKEN"):
            load_reward("remote", url=f"{server.root}/slow")
        for known in ({"url": f"{server.root}/slow?token={TOKEN}"}, {"url": f"{server.root}/slow", "token": TOKEN}):
            assert load_reward("remote", **known).score(IMAGES[:1], ["a"]).tolist() == [60.0]
        monkeypatch.setenv("DIFFALIGN_TOKEN", TOKEN)
        assert load_reward("remote", url=f"{server.root}/double").score(IMAGES[:1], ["a"]).tolist() == [120.0]
        with pytest.raises(DiffalignError, match="serves double, slow; name one: "):
            load_reward("remote", url=server.root)
        with pytest.raises(DiffalignError, match="serves no 'hpsv2', but double, slow"):
            load_reward("remote", url=f"{server.root}/hpsv2")


def test_a_server_that_changes_its_reward_is_noticed() -> None:
    with serving({"slow": Slow(1.0)}) as server:
        port = int(server.root.rpartition(":")[2])
        remote = load_reward("remote", url=server.root)
        assert remote.score(IMAGES[:1], ["a"]).tolist() == [60.0]
    other = "now serves another slow than at the start"
    with serving({"slow": Slow(3.0)}, port=port), pytest.raises(DiffalignError, match=other):
        remote.score(IMAGES[:1], ["a"])


Reply = Callable[[str], tuple[int, bytes]]


@contextmanager
def stranger(reply: Reply) -> Iterator[str]:
    """A server of somebody else: what it answers to a path."""

    class Handler(Quiet):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            status, body = reply(self.path)
            self.answer(body, status)

        do_POST = do_GET

    with http_server(Handler) as url:
        yield url


def catalogue(**changed: Any) -> bytes:
    """Return the catalogue of a server of one reward, with changes of that reward."""
    with serving({"slow": Slow()}) as server:
        found: Catalogue = server.service.catalogue
    values = found.model_dump()
    values["rewards"]["slow"] |= changed
    return json.dumps(values).encode()


@pytest.mark.parametrize(
    ("body", "line"),
    [
        (b"<html>hello</html>", "does not answer as `diffalign serve` does"),
        (b"[]", "does not answer as `diffalign serve` does"),
        (b"[" * 100_000, "does not answer as `diffalign serve` does"),
        (b'{"protocol": 2}', "speaks version 2 of the protocol and this client 1"),
        (b'{"protocol": 1}', "Field required"),
        (catalogue(columns=["../../etc/passwd"]), "of its columns has another form"),
        (catalogue(columns=[]), "of its columns has another form"),
        (catalogue(columns=["group_id"]), "calls a column group_id"),
        (catalogue(range="all"), "rewards.slow.range"),
    ],
)
def test_a_stranger_at_the_address_is_one_line(body: bytes, line: str) -> None:
    with stranger(lambda path: (200, body)) as url, pytest.raises(DiffalignError, match=re.escape(line)):
        load_reward("remote", url=url)


@pytest.mark.parametrize(
    ("results", "line"),
    [
        ([{"slow": {"score": 1.0}}], "one without a score and an error"),
        ([{"slow": {"error": "a", "columns": {"slow": 0.0}}}], "one without a score and an error"),
        ([], "0 answers for 1 images"),
        ([{"other": {"error": "a"}}], "no 'slow'"),
        ([{"slow": {"columns": {"slow": "0.5"}}}], "results.0.slow.columns.slow"),
    ],
)
def test_an_answer_that_says_nothing_is_no_score(results: Any, line: str) -> None:
    described = catalogue()
    digest = json.loads(described)["rewards"]["slow"]["digest"]
    rewards = {"slow": {"columns": ["slow", "batch"], "digest": digest}}
    answer = json.dumps({"protocol": 1, "version": "1", "rewards": rewards, "results": results}).encode()
    with stranger(lambda path: (200, described if path == "/v1/rewards" else answer)) as url:
        remote = load_reward("remote", url=url)
        with pytest.raises(DiffalignError, match=re.escape(line)):
            remote.score(IMAGES[:1], ["a"])


def test_busy_and_lost_connections_are_tried_again_and_refusals_are_not() -> None:
    described, asked = catalogue(), []

    def reply(path: str) -> tuple[int, bytes]:
        asked.append(path)
        return {1: (503, b"{}"), 2: (429, b"no json"), 3: (502, b"")}.get(len(asked), (200, described))

    with stranger(reply) as url:
        assert load_reward("remote", url=url, patience=20).columns == ("slow", "batch")
        assert len(asked) == 4
        asked.clear()
        with pytest.raises(
            DiffalignError, match=r"no answer from \S+ in (1 try|\d+ tries) over 0.1 s: 503 Service Unavailable"
        ):
            load_reward("remote", url=url, patience=0.1)
    asked.clear()

    def refuse(path: str) -> tuple[int, bytes]:
        asked.append(path)
        return 404, b'{"error": "not\\nhere"}'

    with stranger(refuse) as url, pytest.raises(DiffalignError, match="404 not here"):
        load_reward("remote", url=url, patience=20)
    assert len(asked) == 1


def start(port: int) -> subprocess.Popen[str]:
    """Start `diffalign serve` as a process."""
    line = [sys.executable, "-m", "diffalign", "serve", "-r", "sharpness", "--port", str(port), "--device", "cpu"]
    return subprocess.Popen(line, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_server_that_is_killed_and_started_again_loses_nothing() -> None:
    """A client scores 60 images one by one; the server is killed at the 20th, started again, and ended by SIGTERM."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    expected = load_reward("sharpness").score(IMAGES, PROMPTS).tolist()
    first = start(port)
    second = None
    try:
        remote = load_reward("remote", url=f"http://127.0.0.1:{port}/sharpness", patience=300)
        scores = []
        for n in range(60):
            if n == 20:
                os.kill(first.pid, signal.SIGKILL)
                first.wait()
                second = start(port)
            scores += remote.score([IMAGES[n % 5]], ["a"]).tolist()
        assert scores == expected * 12
        assert second is not None
        second.send_signal(signal.SIGTERM)
        shown = second.communicate(timeout=30)[0].splitlines()
        assert second.returncode == 0, shown
        assert f"serving sharpness: reward {{name: remote, url: http://127.0.0.1:{port}/sharpness}}" in shown
        assert shown[-1] == "stopped after 40 requests with 40 answers"
        started = time.monotonic()
        remote.patience = 0.3
        with pytest.raises(DiffalignError, match=f"no answer from http://127.0.0.1:{port}"):
            remote.score(IMAGES[:1], ["a"])
        assert time.monotonic() - started < 5
    finally:
        for process in (first, second):
            if process is not None and process.poll() is None:
                process.kill()


def test_serve_refuses_what_it_cannot_serve(capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown reward" in command_line.refused(capsys, "serve", "-r", "hpsv9")
    assert "16 to 256 characters" in command_line.refused(capsys, "serve", "-r", "sharpness", "--token", "short")
    line = command_line.refused(capsys, "serve", "-r", "remote:url=http://127.0.0.1:1/a")
    assert "give its own address to the clients" in line
