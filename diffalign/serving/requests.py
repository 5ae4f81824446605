"""Read what a request asks to score: JSON with base64, a form with image parts, or what Flow-Factory's trainer sends."""

from __future__ import annotations

import base64
import binascii
import json
import re
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from diffalign.rewards.base import Metadata
from diffalign.rewards.remote_protocol import Message, ScoreRequest, first_fault

NO_PICKLE = (
    "pickle is not read here, since reading one can run code; send JSON or a form to /v1/score, or JSON to /compute "
    "(docs/serve.md)"
)
DATA_URI = re.compile(r"data:[\w/+.;=-]*;base64,")
IMAGE_PARTS, PROMPT_FIELDS, REWARD_FIELDS = ("images", "image"), ("prompts", "prompt"), ("rewards", "reward")
TEXT = 2**20
"""Bytes of a form's field that is no image."""


@dataclass(frozen=True)
class Asked:
    """A request that was understood. images: bytes of files, or why there are none; the lists have one entry an image."""

    images: list[bytes | str]
    prompts: list[str | None]
    metadata: list[Metadata]
    rewards: list[str] | None


class _InMemory(MultiPartParser):
    """Starlette's parser without temporary files: the guard has bounded the body."""

    spool_max_size = 2**31


class ComputeRequest(Message):
    """The request of Flow-Factory's remote reward; its server's template reads the plural names. Other keys are ignored."""

    prompt: list[str] | None = None
    prompts: list[str] | None = None
    image: list[str] | None = None
    images: list[str] | None = None


async def read_score(request: Request, most: int) -> Asked:
    """Return what /v1/score is asked. most: images of one request. Raises HTTPException with a line for all else."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _read_form(request, most)
    body = await _body(request, kind)
    try:
        asked = ScoreRequest.model_validate_json(body)
    except ValidationError as error:
        raise HTTPException(400, first_fault(error)) from None
    return _checked([_decoded(image) for image in asked.images], asked, most)


async def read_compute(request: Request, most: int) -> Asked:
    """Return what /compute is asked. Raises HTTPException with a line for what cannot be read."""
    body = await _body(request, request.headers.get("content-type", "").partition(";")[0].strip().lower())
    try:
        given = ComputeRequest.model_validate_json(body)
    except ValidationError as error:
        raise HTTPException(400, first_fault(error)) from None
    images, prompts = given.image or given.images or [], given.prompt or given.prompts
    return _checked([_decoded(image) for image in images], ScoreRequest(prompts=list(prompts or [])), most)


async def _body(request: Request, kind: str) -> bytes:
    """Return the body of a request that should be JSON."""
    body = await request.body()
    # The first byte of every pickle since protocol 2; JSON never begins so.
    if body[:1] == b"\x80" or "pickle" in kind:
        raise HTTPException(415, NO_PICKLE)
    if kind not in ("application/json", "text/plain", ""):
        raise HTTPException(415, f"content type {kind[:80]!r}; send application/json or multipart/form-data")
    return body


async def _read_form(request: Request, most: int) -> Asked:
    """Return what a form asks: parts `image`, fields `prompt` and `reward`, or a field `request` with the JSON of it all."""
    parser = _InMemory(request.headers, request.stream(), max_files=most, max_fields=most + 64, max_part_size=TEXT)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise HTTPException(413 if "Too many" in error.message else 400, f"the form: {error.message}") from None
    images: list[bytes | str] = []
    texts: dict[str, list[str]] = {}
    async with _closing(form.multi_items()):
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                if name not in IMAGE_PARTS:
                    raise HTTPException(400, f"the form: a file called {name[:80]!r}; call the images `image`")
                images.append(await value.read())
            else:
                texts.setdefault(name, []).append(value)
    packed = texts.pop("request", ["{}"])[-1]
    try:
        asked = ScoreRequest.model_validate_json(packed)
        prompts = [text for name in PROMPT_FIELDS for text in texts.pop(name, [])]
        rewards = [text for name in REWARD_FIELDS for text in texts.pop(name, [])]
        added: dict[str, Any] = {"prompts": prompts} if prompts else {}
        added |= {"rewards": rewards} if rewards else {}
        asked = asked.model_copy(update=added)
    except ValidationError as error:
        raise HTTPException(400, f"the form's request: {first_fault(error)}") from None
    if texts:
        raise HTTPException(
            400, f"the form: unknown field {next(iter(texts))[:80]!r}; image, prompt, reward or request"
        )
    return _checked(images + [_decoded(image) for image in asked.images], asked, most)


class _closing:
    """Closes the files of a form."""

    def __init__(self, items: list[tuple[str, UploadFile | str]]) -> None:
        self.files = [value for _, value in items if isinstance(value, UploadFile)]

    async def __aenter__(self) -> None:
        return

    async def __aexit__(self, *_: object) -> None:
        for file in self.files:
            await file.close()


def _checked(images: list[bytes | str], asked: ScoreRequest, most: int) -> Asked:
    """Return the lists of a request, each with one entry an image. Raises HTTPException if their lengths do not agree."""
    count = len(images)
    if not count:
        raise HTTPException(400, "no images; send `images`, a list of base64, or parts `image` of a form")
    if count > most:
        raise HTTPException(413, f"{count} images in one request, more than {most}; send them in several")
    prompts = asked.prompts
    if prompts is None or isinstance(prompts, str):
        prompts = [prompts] * count
    if len(prompts) == 1:
        prompts = prompts * count
    metadata = asked.metadata if asked.metadata is not None else [{} for _ in images]
    for what, given in (("prompts", prompts), ("metadata", metadata)):
        if len(given) != count:
            raise HTTPException(400, f"{len(given)} {what} for {count} images; send one for each")
    return Asked(images, prompts, metadata, asked.rewards)


def _decoded(image: str) -> bytes | str:
    """Return the bytes of an image in base64, or why it has none."""
    text = image[found.end() :] if (found := DATA_URI.match(image[:200])) else image
    try:
        return base64.b64decode(text, validate=True) or "empty file"
    except (binascii.Error, ValueError):
        return "no base64"


def as_json(value: object) -> bytes:
    """Return strict JSON: a number that is not finite would be an error of ours."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()
