"""What every request passes before an app sees it: the host's name, the origin, the token and the size of the body."""

import asyncio
import base64
import binascii
import hmac
import time
from collections.abc import Mapping
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from diffalign.web.address import Address

POLICY = (
    "default-src 'none'; img-src 'self' data: blob:; style-src 'unsafe-inline'; script-src {scripts}; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
"""Content-Security-Policy: a page shows and asks its own server, and runs the scripts that it was sent with."""
HEADERS = {
    "Content-Security-Policy": POLICY.format(scripts="'none'"),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""Headers of every answer that does not set its own."""
READ_ONLY = ("GET", "HEAD", "OPTIONS")
PATIENCE = 5.0
"""Seconds for which the rest of a body that is too large is read and dropped, so that its sender sees the answer."""


@dataclass(frozen=True)
class Limits:
    """Bounds on what requests may send. body: bytes of one. bodies: bytes of all that are being received or answered.

    seconds: within which a body must have arrived.
    """

    body: int = 64 * 2**20
    bodies: int = 512 * 2**20
    seconds: float = 60.0


def refusal(status: int, why: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """Return an error as an answer: `{"error": "one line"}`."""
    return JSONResponse({"error": " ".join(why.split())}, status_code=status, headers=headers)


class Guard:
    """The outermost ASGI layer of an app. open_paths: those that need no token, such as a health check."""

    def __init__(self, app: ASGIApp, address: Address, limits: Limits, open_paths: tuple[str, ...] = ()) -> None:
        self.app, self.address, self.limits, self.open_paths = app, address, limits, open_paths
        self.held = 0  # bytes of bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        body = _Body(self, receive)
        answer = self._refuse(scope) or self._welcome(scope)
        if answer is not None:
            if answer.status_code == 413:
                await body.drop()
            await answer(scope, receive, send_guarded)
            return
        try:
            await self.app(scope, body.receive, send_guarded)
        finally:
            self.held -= body.size

    def _refuse(self, scope: Scope) -> Response | None:
        """Return the answer to a request that the app must not see."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self.address.allows(_without_port(host)):
            return refusal(403, f"host {host[:100]!r} is not served here; add its name with --allow-host")
        origin = headers.get("origin")
        if scope["method"] not in READ_ONLY and origin is not None and urlsplit(origin).netloc != host:
            return refusal(403, f"a page of {origin[:100]!r} may not send here")
        if scope["path"] not in self.open_paths and not self._has_token(scope, headers):
            why = "a token is needed: open the address that the server printed, or send 'Authorization: Bearer TOKEN'"
            return refusal(401, why, {"WWW-Authenticate": "Bearer"})
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > self.limits.body:
            return refusal(413, self.too_large(), {"Connection": "close"})
        return None

    def too_large(self) -> str:
        """Return the line for a body above the limit."""
        return f"the body has more than {self.limits.body} bytes; send fewer or smaller images in a request"

    def _has_token(self, scope: Scope, headers: Headers) -> bool:
        """Return whether a request carries the token, in a header, in its address or in the cookie set by `_welcome`."""
        if self.address.token is None:
            return True
        given = [_authorization(headers.get("authorization", "")), _query(scope).get("token", "")]
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(_cookie_name(scope))
        except CookieError:
            cookie = None
        given += [cookie.value] if cookie else []
        return any(hmac.compare_digest(one.encode(), self.address.token.encode()) for one in given)

    def _welcome(self, scope: Scope) -> Response | None:
        """Move the token from a page's address into a cookie, so that it is in no history, link or picture of the screen."""
        query = _query(scope)
        reads_page = scope["method"] == "GET" and "text/html" in Headers(scope=scope).get("accept", "")
        if self.address.token is None or "token" not in query or not reads_page:
            return None
        token = query.pop("token")
        # One slash: //name would be another server.
        path = "/" + scope["path"].lstrip("/")
        answer = RedirectResponse(path + (f"?{urlencode(query)}" if query else ""), status_code=303)
        answer.set_cookie(_cookie_name(scope), token, httponly=True, samesite="lax")
        return answer


class _Body:
    """The body of a request: counted while it arrives."""

    def __init__(self, guard: Guard, receive: Receive) -> None:
        self.guard, self._receive = guard, receive
        self.size = 0
        self.more = True
        self.until = time.monotonic() + guard.limits.seconds

    async def receive(self) -> Message:
        """Return the next message. Raises HTTPException for a body that is too large or too slow, or one too many."""
        if not self.more:  # the app waits for the client to leave
            return await self._receive()
        try:
            async with asyncio.timeout(max(0.0, self.until - time.monotonic())):
                message = await self._receive()
        except TimeoutError:
            why = f"the body did not arrive within {self.guard.limits.seconds:g} seconds"
            raise HTTPException(408, why, {"Connection": "close"}) from None
        self.more = bool(message.get("more_body"))
        size = len(message.get("body", b""))
        self.size += size
        self.guard.held += size
        if self.size > self.guard.limits.body:
            await self.drop()
            raise HTTPException(413, self.guard.too_large(), {"Connection": "close"})
        if self.guard.held > self.guard.limits.bodies:
            await self.drop()
            raise HTTPException(503, "too many bodies at once; try again", {"Connection": "close", "Retry-After": "1"})
        return message

    async def drop(self) -> None:
        """Read what is left of the body, up to its limit, and keep none of it."""
        dropped = 0
        try:
            async with asyncio.timeout(PATIENCE):
                while self.more and dropped <= self.guard.limits.body:
                    message = await self._receive()
                    self.more = bool(message.get("more_body"))
                    dropped += len(message.get("body", b""))
        except TimeoutError:
            return


def _authorization(header: str) -> str:
    """Return the token in a header: `Bearer TOKEN`, or the password of basic authentication, which an address can hold."""
    scheme, _, rest = header.partition(" ")
    if scheme.lower() != "basic":
        return rest if scheme.lower() == "bearer" else ""
    try:
        return base64.b64decode(rest, validate=True).decode().partition(":")[2]
    except (binascii.Error, ValueError):
        return ""


def _query(scope: Scope) -> dict[str, str]:
    """Return the query of an address, the last value of each name."""
    return dict(parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True))


def _cookie_name(scope: Scope) -> str:
    """Return the name of the cookie: browsers share cookies between the ports of a host."""
    return f"diffalign-{(scope.get('server') or ('', 0))[1]}"


def _without_port(host: str) -> str:
    """Return the host of a Host header without its port and without an IPv6 address's brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]
