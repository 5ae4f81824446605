"""The requests and answers of `diffalign serve`, version 1, as both sides check them; docs/serve.md explains them."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

PROTOCOL = 1
"""Changes when an answer of before would be misread."""
CATALOGUE, SCORE, HEALTH = "/v1/rewards", "/v1/score", "/health"
BUSY = (429, 503)
"""Statuses of a server that could not take a request now: the same request may be sent again."""


class Message(BaseModel):
    """A part of a request or an answer. Keys of a later version are ignored; a value of another type is an error."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class ScoreRequest(Message):
    """What to score. A multipart request has its images as parts of their own.

    images: base64 of image files, or data URIs. prompts: one for each image, or one for all; null where there is none.
    rewards: labels of what is served; without them all. metadata: what a prompt file says of each prompt.
    """

    model_config = ConfigDict(extra="forbid")  # a mistyped key would be ignored without a word

    images: list[str] = []
    prompts: list[str | None] | str | None = None
    rewards: list[str] | None = None
    metadata: list[dict[str, Any]] | None = None


class Answer(Message):
    """One image and one reward. Either a score with every column (null where a column has no value), or an error.

    failed: the reward raised the error, and another try may succeed; else it is the reward's own answer.
    """

    score: float | None = None
    columns: dict[str, float | None] | None = None
    error: str | None = None
    failed: bool = False


class Served(Message):
    """What is said of a reward that answers. digest: of its identity."""

    columns: list[str]
    digest: str


class ScoreAnswer(Message):
    """results: for each image an answer by label, in the order of the request."""

    protocol: int
    version: str
    rewards: dict[str, Served]
    results: list[dict[str, Answer]]


class ServedReward(Served):
    """A reward in the catalogue: what its class states, and which weights it runs."""

    name: str
    about: str
    range: tuple[float | None, float | None]
    usual: str
    licence: str
    weights: str
    reads: list[str]
    identity: dict[str, Any]
    provenance: dict[str, Any]


class ServerLimits(Message):
    """images: of one request. body: bytes of one request. pixels: of one image."""

    images: int = Field(gt=0)
    body: int = Field(gt=0)
    pixels: int = Field(gt=0)


class Catalogue(Message):
    """What a server serves, by label."""

    protocol: int
    version: str
    limits: ServerLimits
    rewards: dict[str, ServedReward]


def identity_digest(identity: dict[str, Any]) -> str:
    """Return a hash of a reward's identity: 16 hex digits. Answers carry it, so that a client sees when it changes."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def first_fault(error: ValidationError) -> str:
    """Return where a message is wrong and why, in one line without its content."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {first['msg']}" if where else first["msg"]
