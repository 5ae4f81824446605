"""A small server that speaks OpenAI's chat completions, and checks each request by the published schema.

The schema is that of POST /chat/completions (developers.openai.com/api/reference): the keys used here with their types, an
`image_url` part with a data URL, and `top_logprobs` of 0 to 20 only beside `logprobs: true`.
"""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image

from helpers.http_server import Quiet, http_server

Reply = tuple[int, Any] | tuple[int, Any, dict[str, str]]
KEYS: dict[str, type | tuple[type, ...]] = {
    "model": str, "messages": list, "max_tokens": int, "temperature": (int, float), "top_p": (int, float), "seed": int,
    "logprobs": bool, "top_logprobs": int,
}  # fmt: skip


def check(body: Any) -> None:
    """Fail for a body that the published schema does not allow."""
    assert isinstance(body, dict) and {"model", "messages"} <= set(body) <= set(KEYS), sorted(body)
    for key, value in body.items():
        assert isinstance(value, KEYS[key]) and (KEYS[key] is bool or not isinstance(value, bool)), (key, value)
    assert 0 <= body.get("temperature", 1) <= 2 and body["max_tokens"] > 0
    assert "top_logprobs" not in body or (body["logprobs"] is True and 0 <= body["top_logprobs"] <= 20)
    for message in body["messages"]:
        assert set(message) == {"role", "content"} and message["role"] == "user"
        for part in message["content"]:
            if part["type"] == "text":
                assert set(part) == {"type", "text"} and isinstance(part["text"], str)
            else:
                assert part["type"] == "image_url" and set(part) == {"type", "image_url"}
                assert set(part["image_url"]) == {"url"} and part["image_url"]["url"].startswith("data:image/")


def images_of(body: dict[str, Any]) -> list[Image.Image]:
    """The images of a request, decoded."""
    urls = [p["image_url"]["url"] for p in body["messages"][0]["content"] if p["type"] == "image_url"]
    return [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB") for url in urls]


def text_of(body: dict[str, Any]) -> str:
    return "\n".join(p["text"] for p in body["messages"][0]["content"] if p["type"] == "text")


def completion(text: str, top: dict[str, float] | None = None, finish: str = "stop") -> Reply:
    """A chat completion; `top`: logprobs of the alternatives at its last token."""
    choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    if top is not None:
        alternatives = [{"token": t, "logprob": v, "bytes": None} for t, v in top.items()]
        token = {"token": text[-1:], "logprob": top.get(text[-1:], -9.0), "bytes": None, "top_logprobs": alternatives}
        choice["logprobs"] = {"content": [token], "refusal": None}
    return 200, {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}


class Served:
    """Requests so far: bodies, and the Authorization header of each. busiest: the most that ran side by side."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.faults: list[str] = []
        self.busiest = self.busy = 0
        self.url = ""


@contextmanager
def chat_server(answer: Callable[[dict[str, Any], int], Reply]) -> Iterator[Served]:
    """Serve on a free port of this machine; `answer` gets the body and the number of the request, from 0."""
    served, lock = Served(), threading.Lock()

    class Handler(Quiet):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(served.bodies)
                served.bodies.append(body)
                served.keys.append(self.headers.get("Authorization"))
                served.busy += 1
                served.busiest = max(served.busiest, served.busy)
            try:
                assert self.path == "/v1/chat/completions" and self.headers["Content-Type"] == "application/json"
                check(body)
            except (AssertionError, KeyError, TypeError) as fault:
                served.faults.append(repr(fault))
            status, found, *more = answer(body, number)
            data = found if isinstance(found, bytes) else json.dumps(found).encode()
            with lock:
                served.busy -= 1
            self.answer(data, status, **(more[0] if more else {}))

    with http_server(Handler) as url:
        served.url = f"{url}/v1"
        yield served
    assert not served.faults
