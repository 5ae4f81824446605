"""Ask image-text models behind an address that speaks OpenAI's chat completions: vLLM, SGLang, Ollama, or a provider.

Requests run side by side, at most `concurrency` at once. One that is refused for load, that times out or whose server
fails is repeated with growing pauses. The key is read from an environment variable for each request, and is stored and
written nowhere.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from diffalign.errors import DiffalignError, brief
from diffalign.files.images import data_uri, encoded
from diffalign.redaction import redact

if TYPE_CHECKING:
    import httpx
    from PIL import Image

REPEATED = (408, 409, 425, 429, 500, 502, 503, 504, 529)
"""Answers after which a request is repeated: the server was busy, or failed."""
ENOUGH = 4
"""When a server has answered nothing yet, and none of at least so many questions, the server is at fault."""
LONGEST_PAUSE = 60.0
TOP = 20
"""Alternatives asked for at each token: the most that OpenAI and vLLM give."""


class NoAnswer(Exception):
    """A request that got no answer after all retries; another run may get one."""


@dataclass(frozen=True)
class Token:
    """A token of an answer. top: the probability of each alternative at its place, its own among them."""

    text: str
    top: dict[str, float]


@dataclass(frozen=True)
class Answer:
    """What a model wrote. tokens: with probabilities, empty where the server gives none. cut: it reached max_tokens."""

    text: str
    tokens: tuple[Token, ...] = ()
    cut: bool = False


@dataclass(frozen=True)
class Question:
    """A user's turn: images, each with the text before it, then a text. seed: only where answers are sampled."""

    text: str
    images: tuple[tuple[str, Image.Image], ...]
    max_tokens: int
    seed: int | None = None


@dataclass
class ChatAPI:
    """An address and how to ask there. Raises DiffalignError for an address that is none.

    url: the base address, which ends before /chat/completions, such as http://localhost:8000/v1. key_env: the environment
    variable that holds the key, if there is one. retries: after the first attempt. timeout: seconds of one request.
    """

    url: str
    model: str
    key_env: str = "OPENAI_API_KEY"
    retries: int = 4
    timeout: float = 120.0
    concurrency: int = 8
    temperature: float = 0.0
    top_p: float | None = None
    logprobs: bool = True
    pause: float = 1.0
    _answered: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise DiffalignError(f"url {redact(self.url)!r}: no address; write http://HOST:PORT/v1")
        if parts.username or parts.password or parts.query:
            raise DiffalignError(
                "url: leave keys out of the address; put the key into a variable and name it: key_env="
            )
        if self.retries < 0 or self.concurrency < 1 or self.timeout <= 0:
            raise DiffalignError("retries must be at least 0, concurrency at least 1, and timeout above 0")

    def ask(self, questions: Sequence[Question]) -> list[Answer | NoAnswer]:
        """Return an answer for each question, in order, or why there is none.

        Raises DiffalignError where every further request would fail too: no server, a wrong key, model or address.
        """
        import httpx

        limits = httpx.Limits(max_connections=self.concurrency)
        with (
            httpx.Client(timeout=self.timeout, limits=limits, follow_redirects=False) as client,
            ThreadPoolExecutor(self.concurrency) as pool,
        ):
            found = list(pool.map(lambda question: self._one(client, question), questions))
        if not self._answered and len(found) >= ENOUGH and all(isinstance(one, NoAnswer) for one in found):
            raise DiffalignError(str(found[0]))  # no image's fault
        return found

    def _one(self, client: httpx.Client, question: Question) -> Answer | NoAnswer:
        import httpx

        why, wait = "", 0.0
        for attempt in range(self.retries + 1):
            time.sleep(wait)
            wait = min(LONGEST_PAUSE, self.pause * 2**attempt)
            asked_for_logprobs = self.logprobs
            try:
                reply = client.post(
                    f"{self.url.rstrip('/')}/chat/completions", json=self._body(question), headers=self._headers()
                )
            except httpx.TransportError as error:
                why = f"{type(error).__name__} at {self.url}"
                continue
            if reply.status_code == 200:
                try:
                    answer = read_answer(reply.json())
                except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError) as error:
                    why = f"no chat completion in the answer of {self.url} ({brief(error)})"
                    continue
                self._answered = True
                return answer
            why = f"{self.url} answered {reply.status_code}: {brief(Exception(redact(_message(reply))))}"
            if reply.status_code in (400, 422) and asked_for_logprobs and "logprob" in _message(reply).lower():
                self.logprobs = False  # a server without them; the question is asked again at once
                wait = 0.0
                return self._one(client, question)
            if reply.status_code in (301, 302, 307, 308, 401, 403, 404):
                raise DiffalignError(f"{why}; check url=, model= and the key in ${self.key_env}")
            if reply.status_code not in REPEATED:
                return NoAnswer(why)
            wait = max(wait, _retry_after(reply))
        if not self._answered and "answered" not in why:
            raise DiffalignError(f"{why} ({self.retries + 1} attempts); is the server running?")
        return NoAnswer(f"{why} ({self.retries + 1} attempts)")

    def _headers(self) -> dict[str, str]:
        key = os.environ.get(self.key_env, "")
        return {"Authorization": f"Bearer {key}"} if key else {}

    def _body(self, question: Question) -> dict[str, Any]:
        content: list[dict[str, Any]] = []
        for before, image in question.images:
            if before:
                content.append({"type": "text", "text": before})
            url = data_uri(encoded(image.convert("RGB"), "PNG"), "png")
            content.append({"type": "image_url", "image_url": {"url": url}})
        content.append({"type": "text", "text": question.text})
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": question.max_tokens,
            "temperature": self.temperature,
        }
        if self.top_p is not None:
            body["top_p"] = self.top_p
        if question.seed is not None:
            body["seed"] = question.seed
        if self.logprobs:
            body |= {"logprobs": True, "top_logprobs": TOP}
        return body


def read_answer(reply: Any) -> Answer:
    """Return what a chat completion says. Raises ValueError, KeyError, IndexError or TypeError for another object."""
    choice = reply["choices"][0]
    text = choice["message"].get("content")
    if not isinstance(text, str):
        raise ValueError("message.content is no text")
    try:
        tokens = _tokens(choice.get("logprobs"))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        tokens = ()  # the text is an answer, whatever form its probabilities have
    return Answer(text, tokens, choice.get("finish_reason") == "length")


def _tokens(logprobs: Any) -> tuple[Token, ...]:
    """Return the tokens of an answer with their probabilities; none where the server gives none.

    Raises ValueError, KeyError, TypeError, AttributeError or OverflowError for another object.
    """
    tokens = []
    for one in (logprobs or {}).get("content") or []:
        top = {str(t["token"]): _probability(t["logprob"]) for t in one.get("top_logprobs") or []}
        top.setdefault(str(one["token"]), _probability(one["logprob"]))
        tokens.append(Token(str(one["token"]), top))
    return tuple(tokens)


def _probability(logprob: Any) -> float:
    if math.isnan(value := float(logprob)):
        raise ValueError("a logprob is not a number")
    return math.exp(min(0.0, value))


def _message(reply: httpx.Response) -> str:
    """Return the message of an error: `error.message` as OpenAI has it, else the beginning of the text."""
    try:
        found = reply.json()
        error = found.get("error", found)
        return str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, AttributeError):
        return reply.text[:200] or reply.reason_phrase or "no message"


def _retry_after(reply: httpx.Response) -> float:
    """Return the seconds that the server asks to wait, 0 where it names none."""
    try:
        return min(LONGEST_PAUSE, max(0.0, float(reply.headers.get("retry-after", "0"))))
    except ValueError:
        return 0.0
