"""The addresses of a reward server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from diffalign import web
from diffalign.report.page import render_page
from diffalign.rewards.remote_protocol import CATALOGUE, HEALTH, PROTOCOL, SCORE
from diffalign.serving.requests import NO_PICKLE, Asked, as_json, read_compute, read_score
from diffalign.serving.service import AnswerDict, Service
from diffalign.version import __version__

Endpoint = Callable[[Request], Awaitable[Response]]
COMPUTE = "/compute"


def reward_app(service: Service, address: web.Address, limits: web.Limits) -> ASGIApp:
    """Return the app of a service: /v1/score, /v1/rewards, /compute, /health, /metrics and the page at /."""
    handlers = _Handlers(service)
    routes = [
        Route("/", handlers.counted("/", handlers.page)),
        Route("/", handlers.counted("/", handlers.pickle), methods=["POST"]),
        Route(SCORE, handlers.counted(SCORE, handlers.score), methods=["POST"]),
        Route(CATALOGUE, handlers.counted(CATALOGUE, handlers.rewards)),
        Route(COMPUTE, handlers.counted(COMPUTE, handlers.compute), methods=["POST"]),
        Route(HEALTH, handlers.health),
        Route("/metrics", handlers.metrics),
        # A trainer that knows one address for one reward, as in http://host:8000/hpsv2.
        Route("/{label}/compute", handlers.counted(COMPUTE, handlers.compute), methods=["POST"]),
        Route("/{label}/health", handlers.health),
    ]
    return web.build_app(routes, address, limits, open_paths=(HEALTH,))


class _Handlers:
    """What each address does."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def counted(self, path: str, endpoint: Endpoint) -> Endpoint:
        """Return an endpoint whose requests are counted by status."""

        async def run(request: Request) -> Response:
            status = 500
            try:
                answer = await endpoint(request)
                status = answer.status_code
                return answer
            except HTTPException as error:
                status = error.status_code
                raise
            finally:
                self.service.metrics.request(path, status)

        return run

    async def page(self, request: Request) -> Response:
        catalogue = self.service.catalogue
        return web.page(
            lambda nonce: render_page(
                "diffalign.serving",
                "served.html.j2",
                nonce=nonce,
                rewards=catalogue.rewards,
                limits=catalogue.limits,
                settings=self.service.settings,
                root=f"{request.url.scheme}://{request.url.netloc}",
            )
        )

    async def pickle(self, request: Request) -> Response:
        raise HTTPException(415, NO_PICKLE)

    async def rewards(self, request: Request) -> Response:
        return JSONResponse(self.service.catalogue.model_dump())

    async def score(self, request: Request) -> Response:
        self.service.check_room()  # before the body is read
        started = time.monotonic()
        asked = await read_score(request, self.service.settings.images)
        results = await self._scored(request, asked)
        self.service.metrics.answered(time.monotonic() - started)
        served = self.service.catalogue.rewards
        rewards = {label: {"columns": served[label].columns, "digest": served[label].digest} for label in results[0]}
        answer = {"protocol": PROTOCOL, "version": __version__, "rewards": rewards, "results": results}
        return Response(as_json(answer), media_type="application/json")

    async def compute(self, request: Request) -> Response:
        """Answer `{"rewards": [...]}`, or an error if any image has no score: this form has no place for one image's."""
        self.service.check_room()
        asked = await read_compute(request, self.service.settings.images)
        label = request.path_params.get("label") or request.query_params.get("reward")
        lanes = self.service.chosen([label] if label else None)
        if len(lanes) > 1:
            names = ", ".join(lane.label for lane in lanes)
            raise HTTPException(400, f"this server has {names}; name one: /NAME/compute")
        results = await self._scored(request, Asked(asked.images, asked.prompts, asked.metadata, [lanes[0].label]))
        answers = [one[lanes[0].label] for one in results]
        for n, answer in enumerate(answers):
            if "error" in answer:
                raise HTTPException(422, f"image {n} has no score: {answer['error']}")
        return JSONResponse({"rewards": [answer["score"] for answer in answers]})

    async def _scored(self, request: Request, asked: Asked) -> list[dict[str, AnswerDict]]:
        """Return the answers; drop the images if the client leaves before that."""
        work = asyncio.ensure_future(self.service.score(asked))
        left = asyncio.ensure_future(_leaves(request))
        try:
            await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise HTTPException(499, "the client has left")
            return await work
        finally:
            left.cancel()
            work.cancel()

    async def health(self, request: Request) -> Response:
        broken = self.service.broken
        state = {
            "status": broken or "ok",
            "version": __version__,
            "rewards": list(self.service.lanes),
            "queue": self.service.waiting,
            "seconds": round(time.time() - self.service.started, 1),
        }
        return JSONResponse(state, status_code=503 if broken else 200)

    async def metrics(self, request: Request) -> Response:
        text = self.service.metrics.text({"diffalign_queue_images": self.service.waiting})
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")


async def _leaves(request: Request) -> None:
    """Wait until the client closes the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        continue
