"""A hub that does not answer costs seconds, whatever is asked of it, and the message says what to type elsewhere."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from diffalign.data.suites_hub import fetch as fetch_suite
from diffalign.errors import DiffalignError
from diffalign.hub import download_command
from diffalign.pipelines import load_backbone
from diffalign.rewards import load_reward


@pytest.fixture(params=["closed", "silent"])
def nobody(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An endpoint that refuses connections, and one that takes them and never says a word."""
    from huggingface_hub import constants

    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    if request.param == "closed":
        listener.close()
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield
    listener.close()


def test_it_is_tried_once_and_briefly(nobody: None) -> None:
    wanted: list[tuple[Callable[[], object], str]] = [
        (lambda: load_backbone("acme/model"), 'hf download acme/model --include "*.json"'),
        (lambda: load_backbone("acme/other"), "set model.path=other"),
        (lambda: load_reward("pickscore").identity(), "hf download yuvalkirstain/PickScore_v1"),
        (lambda: load_reward("hpsv2").identity(), "hf download xswu/HPSv2 HPS_v2.1_compressed.pt"),
        (lambda: load_reward("imagereward").identity(), "hf download THUDM/ImageReward ImageReward.pt"),
        (lambda: fetch_suite("drawbench", "DrawBench Prompts - Sheet1.csv", None), "not in the local cache"),
    ]
    began = time.monotonic()
    for action, said in wanted:
        with pytest.raises(DiffalignError, match="not in the local cache|not reachable") as caught:
            action()
        assert said in str(caught.value) and "\n" not in str(caught.value)
    assert time.monotonic() - began < 10  # one try of two seconds; the client's own retries take half a minute each


def test_the_command_fetches_what_a_pipeline_needs() -> None:
    assert download_command("a/b", "b", "fp16") == (
        'hf download a/b --include "*.json" "*.txt" "*.model" "*.fp16.safetensors" --local-dir b'
    )
    assert download_command("a/b", "b", file="x.pt") == "hf download a/b x.pt --local-dir b"
