"""Build the app: its routes behind the guard, and every error as JSON of one line."""

import secrets
from collections.abc import Callable, Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp

from diffalign.errors import DiffalignError
from diffalign.web.address import Address
from diffalign.web.guard import POLICY, Guard, Limits, refusal


def build_app(
    routes: Sequence[BaseRoute],
    address: Address,
    limits: Limits = Limits(),  # noqa: B008  # frozen
    open_paths: tuple[str, ...] = (),
) -> ASGIApp:
    """Return an app that refuses other hosts, other origins, missing tokens and large bodies before a route is asked.

    A route that raises DiffalignError answers 400, an HTTPException its status, any other error 500; each with
    `{"error": "one line"}`. open_paths: paths that need no token.
    """
    app = Starlette(
        routes=[*routes, Route("/favicon.ico", _no_icon)],  # which browsers ask for
        exception_handlers={
            HTTPException: _refused,
            DiffalignError: _mistaken,
            ClientDisconnect: _gone,
            Exception: _broken,
        },
    )
    return Guard(app, address, limits, open_paths)


def page(render: Callable[[str], str]) -> HTMLResponse:
    """Return an HTML page whose scripts run only with the nonce that `render` gets: `<script nonce="{{ nonce }}">`."""
    nonce = secrets.token_urlsafe(16)
    policy = POLICY.format(scripts=f"'nonce-{nonce}'")
    return HTMLResponse(render(nonce), headers={"Content-Security-Policy": policy})


async def _no_icon(request: Request) -> Response:
    return Response(status_code=204)


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return refusal(error.status_code, error.detail, error.headers)


def _mistaken(request: Request, error: Exception) -> Response:
    return refusal(400, str(error))


def _gone(request: Request, error: Exception) -> Response:
    """Answer nobody: the client has left before its body was whole."""
    return Response(status_code=499)


def _broken(request: Request, error: Exception) -> Response:
    # The server closes the connection of a failed request, so the client must not use it again.
    return refusal(500, f"the server failed ({type(error).__name__}); its log says where", {"Connection": "close"})
