"""The app of the voting page: the page, the questions, the votes and the images. Paths hold numbers, never names of files."""

import json
import secrets
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
from pydantic import TypeAdapter, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from diffalign.data.writer import png_bytes
from diffalign.errors import DiffalignError
from diffalign.files.images import Unreadable, decode
from diffalign.files.parse import parse_json
from diffalign.report.page import render_page
from diffalign.vote_page.session import Asked, Given, Sessions, Unknown, tallies
from diffalign.voting.log import NotKept
from diffalign.web import page

LONGEST_BODY = 64 * 2**10
"""Bytes of a vote."""
STARTS = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif"}
"""How files begin that every browser shows as they are; others are sent as PNG."""
KEEP = {"Cache-Control": "private, max-age=86400, immutable"}
"""An image's address is used by one start of the server only."""

_GIVEN = TypeAdapter(Given)


class VotePage:
    """The handlers of one server. rater: the name that a page without `?rater=` votes under. next_steps: commands that
    the end of the page names.
    """

    def __init__(self, sessions: Sessions, rater: str, next_steps: Sequence[str] = ()) -> None:
        self.sessions, self.rater, self.next_steps = sessions, rater, next_steps
        groups = sessions.gallery.groups
        self._first = np.cumsum([0, *(len(group.images) for group in groups)])
        # Numbers in a random order: the order of names could tell which folder an image is from.
        self._number = np.random.default_rng(secrets.randbits(64)).permutation(int(self._first[-1]))
        self._place = np.argsort(self._number)
        self._start = secrets.token_hex(4)

    def routes(self) -> list[Route]:
        """Return the routes of the app."""
        return [
            Route("/", self.show),
            Route("/questions", self.questions),
            Route("/vote", self.vote, methods=["POST"]),
            Route("/undo", self.undo, methods=["POST"]),
            Route("/result", self.result),
            Route("/image/{start}/{number:int}", self.image),
        ]

    async def show(self, request: Request) -> Response:
        """Answer with the page."""
        one = self.sessions
        settings = {
            "rater": self._rater(request),
            "size": one.size,
            "rubric": list(one.rubric),
            "next_steps": list(self.next_steps),
        }
        return page(
            lambda nonce: render_page(
                "diffalign.vote_page", "vote.html.j2", nonce=nonce, settings=settings, about=one.gallery.about
            )
        )

    async def questions(self, request: Request) -> Response:
        """Answer with what a rater is asked now and next."""
        return self._queue(self._rater(request))

    async def vote(self, request: Request) -> Response:
        """Keep a vote, and answer with what is asked next."""
        row = await _body(request)
        question, rater = row.pop("question", None), self._rater(request)
        try:
            given = _GIVEN.validate_python(row, strict=False)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            raise DiffalignError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        try:
            self.sessions.vote(rater, str(question), given)
        except Unknown as error:
            raise HTTPException(409, str(error)) from None
        except NotKept as error:
            raise HTTPException(507, str(error)) from None
        return self._queue(rater)

    async def undo(self, request: Request) -> Response:
        """Take back the last vote, and answer with what is asked next."""
        rater = self._rater(request)
        try:
            self.sessions.undo(rater)
        except NotKept as error:
            raise HTTPException(507, str(error)) from None
        return self._queue(rater)

    async def result(self, request: Request) -> Response:
        """Answer with how often each model was preferred: the first place where the page learns their names."""
        rater = self._rater(request)
        own = [vote for vote in self.sessions.votes if vote.rater == rater]
        return JSONResponse({"votes": len(own), "tallies": [asdict(tally) for tally in tallies(own)]})

    def image(self, request: Request) -> Response:
        """Answer with an image. Not a coroutine: Starlette reads it in a thread, while votes are taken."""
        number = request.path_params["number"]
        if request.path_params["start"] != self._start or not number < len(self._place):
            raise HTTPException(404, "no such image")
        flat = int(self._place[number])
        group = int(np.searchsorted(self._first, flat, side="right")) - 1
        try:
            data = self.sessions.gallery.origins[group][flat - int(self._first[group])].read()
            kind = next((kind for start, kind in STARTS.items() if data.startswith(start)), None)
            kind = "image/webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else kind
            if kind is None:
                data, kind = png_bytes(decode(data)), "image/png"
        except Unreadable as error:
            raise HTTPException(422, str(error)) from None
        return Response(data, media_type=kind, headers=KEEP)

    def _rater(self, request: Request) -> str:
        return request.query_params.get("rater") or self.rater

    def _queue(self, rater: str) -> Response:
        asked = self.sessions.queue(rater)
        progress = asdict(self.sessions.progress(rater))
        return JSONResponse({"questions": [self._shown(one) for one in asked], "progress": progress})

    def _shown(self, asked: Asked) -> dict[str, object]:
        first = int(self._first[asked.question.group])
        return {
            "id": asked.id,
            "prompt": self.sessions.gallery.groups[asked.question.group].prompt,
            "images": [f"image/{self._start}/{int(self._number[first + place])}" for place in asked.order],
        }


async def _body(request: Request) -> dict[str, object]:
    """Return the JSON object of a request's body. Raises DiffalignError for anything else."""
    try:
        row = parse_json(await request.body())
    except (ValueError, json.JSONDecodeError) as error:
        raise DiffalignError(f"the body is no JSON ({error})") from None
    if not isinstance(row, dict):
        raise DiffalignError("the body is no JSON object")
    return row
